"""The operated demo model behind the engine's own server, asked by an OpenAI client."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.conftest import (
    DENSE_LIMIT,
    NEW,
    SPARSE,
    Reference,
    Server,
    complete,
    exported,
    post,
    post_json,
)

from llama_surgery import eject, operate
from llama_surgery.topology.router import PageRouter

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[int]]:
    """Real text of 50 to 6,000 tokens."""
    return reference.prompts(34, 50, 6000)


@pytest.fixture(scope="module")
def written(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    """What generate() of the operated model writes after them."""
    return reference.write(prompts, SPARSE)


def test_theta_zero_writes_what_the_dense_model_writes(
    reference: Reference, prompts: list[list[int]], dense_limit_folder: Path, tmp_path: Path
) -> None:
    want = reference.write(prompts, None)
    server = Server(dense_limit_folder, tmp_path / "log.txt").start()
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    assert DENSE_LIMIT.theta == 0
    reference.assert_equal(prompts, want, got)


def test_operated_model_writes_what_generate_writes(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    got = [complete(server.client(), prompt) for prompt in prompts]
    reference.assert_equal(prompts, written, got)
    assert server.text().count("llama-surgery is active: 8 layers operated") == 1


def test_sixteen_requests_at_once(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    chosen = slice(1, 33, 2)
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts[chosen]))
    assert len(got) == 16
    reference.assert_equal(prompts[chosen], written[chosen], got)


def test_shared_prefix_is_cached(server: Server, reference: Reference) -> None:
    prefix, *tails = [part[0] for part in (reference.prompts(1, n, n, seed=n) for n in (3000, 40, 150, 333))]
    shared = [prefix + tail for tail in tails]
    want = reference.write(shared, SPARSE)
    hits, queries = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    got = [complete(server.client(), shared[0])]
    before = server.metric(hits), server.metric(queries)
    got += [complete(server.client(), prompt) for prompt in shared[1:]]
    hit, asked = server.metric(hits) - before[0], server.metric(queries) - before[1]
    print(f"prefix cache: {hit:.0f} of {asked:.0f} tokens ({hit / asked:.1%})")
    assert hit == 2 * (3000 // 512) * 512
    reference.assert_equal(shared, want, got)


def test_after_an_aborted_request(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    stream = server.client().completions.create(
        model="books", prompt=prompts[20], max_tokens=2000, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    got = [complete(server.client(), prompt) for prompt in prompts[20:23]]
    reference.assert_equal(prompts[20:23], written[20:23], got)


def test_streaming_chat_stop_and_logprobs(server: Server, reference: Reference) -> None:
    client, question = server.client(), "The old man looked at the sea and"
    options: dict[str, Any] = {"model": "books", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(prompt=question, **options).choices[0].text
    pieces = client.completions.create(prompt=question, stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == whole

    stop = whole.split()[3]
    ended = client.completions.create(prompt=question, stop=[stop], **options).choices[0]
    assert ended.finish_reason == "stop" and ended.text == whole[: whole.index(stop)]

    chat = client.chat.completions.create(messages=[{"role": "user", "content": question}], **options)
    plain = client.completions.create(prompt=question + "\n", **options)
    assert chat.choices[0].message.content == plain.choices[0].text

    probable = client.completions.create(prompt=question, logprobs=5, **options).choices[0].logprobs
    assert len(probable.token_logprobs) == 24 and all(len(top) >= 5 for top in probable.top_logprobs)
    assert all(
        p == max(top.values()) for p, top in zip(probable.token_logprobs, probable.top_logprobs, strict=True)
    )


def test_logprobs_are_those_of_the_operated_model(
    server: Server, reference: Reference, prompts: list[list[int]]
) -> None:
    prompt = prompts[-1]
    operate(reference.model, SPARSE)
    try:
        ids = torch.tensor([prompt])
        out = reference.model.generate(
            ids,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    finally:
        eject(reference.model)
    want = out.logits[0][0].log_softmax(-1).max().item()
    answer = server.client().completions.create(
        model="books", prompt=prompt, max_tokens=1, temperature=0, logprobs=1
    )
    assert answer.choices[0].logprobs.token_logprobs[0] == pytest.approx(want, abs=1e-3)


def test_bad_requests_are_refused_and_the_server_lives_on(server: Server, reference: Reference) -> None:
    path, prompt = "/v1/completions", "Once upon a time"
    assert post(server, path, b"{not json") == 400
    assert post_json(server, path) in (400, 422)
    assert post_json(server, path, prompt=prompt, max_tokens=-1) == 400
    assert post_json(server, path, prompt=prompt, temperature="hot") in (400, 422)
    assert post_json(server, path, prompt=reference.text[:9000], max_tokens=1) == 400
    assert post_json(server, path, prompt=reference.text[:8000], max_tokens=1000) == 400
    assert post_json(server, path, prompt=[[5000]], max_tokens=1) == 400
    assert post_json(server, path, model="another", prompt=prompt) == 404
    assert post_json(server, path, prompt=prompt, max_tokens=1) == 200


def test_counters_are_logged(server: Server) -> None:
    lines = [line for line in server.text().splitlines() if "far density" in line]
    assert lines, "no counters in the log"
    densities = [float(line.split("far density ")[1].split(",")[0]) for line in lines]
    assert max(densities) > 0 and all(0 <= density < 0.5 for density in densities)
    assert any("dense fallbacks" in line and "pages read" in line for line in lines)


def learned(layers: int) -> dict[int, PageRouter]:
    """Corrections as learning gives them, if with random numbers: for all layers but the first."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer: PageRouter(
            offset=0.5 * torch.randn(4, 2, generator=generator),
            mean_weight=1 + 0.1 * torch.randn(4, 2, 64, generator=generator),
            variance_weight=1 + 0.1 * torch.randn(4, 2, 64, generator=generator),
            key_map=torch.eye(64) + 0.05 * torch.randn(4, 64, 64, generator=generator),
        )
        for layer in range(1, layers)
    }


def test_killed_server_restarts(reference: Reference, demo_model_path: Path, tmp_path: Path) -> None:
    """A model with learned corrections. On the second start the cache is so small that sequences which need
    one more block while they write are preempted and computed again."""
    routers = learned(8)
    folder = exported(reference.model, demo_model_path, tmp_path, SPARSE, routers)
    prompts = [reference.prompts(1, n, n, seed=n)[0] for n in (1000, 1010, 2020, 2030, 1500, 1510)]
    want = reference.write(prompts, SPARSE, 4 * NEW, routers)
    small = ("--num-gpu-blocks-override", "16", "--max-model-len", "4096")
    server = Server(folder, tmp_path / "log.txt", *small)
    server.start().kill()
    server.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt, 4 * NEW), prompts))
        preempted = server.metric("vllm:num_preemptions_total")
    finally:
        server.kill()
    assert preempted > 0
    reference.assert_equal(prompts, want, got)


def test_two_tensor_ranks(reference: Reference, demo_model_path: Path, tmp_path: Path) -> None:
    routers = learned(8)
    folder = exported(reference.model, demo_model_path, tmp_path, SPARSE, routers)
    prompts = reference.prompts(6, 300, 2500, seed=2)
    want = reference.write(prompts, SPARSE, NEW, routers)
    server = Server(folder, tmp_path / "log.txt", "--tensor-parallel-size", "2", OMP_NUM_THREADS="1").start()
    try:
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    reference.assert_equal(prompts, want, got)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--kv-cache-dtype", "fp8"), "quantised keys and values"),
        (("--block-size", "128"), "a cache block must be a whole chunk"),
        (
            (
                "--speculative-config",
                '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}',
            ),
            "--speculative-config is not supported",
        ),
        (("--tensor-parallel-size", "8"), "4 KV heads on 8 tensor ranks"),
        (("--max-num-seqs", "500"), "--max-num-batched-tokens 512"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unsupported_options_stop_the_start(
    sparse_folder: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    server = Server(sparse_folder, tmp_path / "log.txt", *options)
    server.launch()
    assert server.wait() not in (None, 0)
    assert reason in server.text()


def test_without_the_plugin_there_is_no_server(sparse_folder: Path, tmp_path: Path) -> None:
    server = Server(sparse_folder, tmp_path / "log.txt", VLLM_PLUGINS="none")
    server.launch()
    assert server.wait() not in (None, 0)
    assert "SurgeryLlamaForCausalLM" in server.text()
