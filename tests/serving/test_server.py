"""The operated demo model behind the engine's own server, asked by an OpenAI client."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import SPARSE, Reference, Server, complete, post, post_json

from llama_surgery import eject, operate

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
        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    reference.assert_equal("θ = 0 against the dense model, 16 at once", prompts, want, got)


def test_sixteen_requests_at_once(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    reference.assert_equal("operated at density 0.06, 16 at once", prompts, written, got)
    assert server.text().count("llama-surgery is active: 8 layers operated") == 1


def test_one_by_one_out_of_the_cache(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    got = [complete(server.client(), prompt) for prompt in prompts]
    reference.assert_equal("operated, again one by one", prompts, written, got)


def test_shared_prefix_is_cached(server: Server, reference: Reference) -> None:
    prefix, *tails = [part[0] for part in (reference.prompts(1, n, n, seed=n) for n in (3000, 40, 150, 333))]
    shared = [prefix + tail for tail in tails]
    want = reference.write(shared, SPARSE)
    hits, queries = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
    got = [complete(server.client(), shared[0])]
    before = server.metric(hits), server.metric(queries)
    got += [complete(server.client(), prompt) for prompt in shared[1:]]
    hit, asked = server.metric(hits) - before[0], server.metric(queries) - before[1]
    reference.summary.append(
        f"prefix cache: {hit:.0f} of {asked:.0f} prompt tokens hit ({hit / asked:.1%}) after the first of "
        f"{len(shared)} prompts with {len(prefix)} tokens in common"
    )
    assert hit == (len(shared) - 1) * (len(prefix) // SPARSE.chunk_size) * SPARSE.chunk_size
    reference.assert_equal("operated, prefix cached", shared, want, got)


def abort(server: Server, prompt: list[int], tokens: int) -> None:
    """Leave a request after it has written ``tokens``; 0: while its prompt is being computed."""
    stream = server.client().completions.create(
        model="books", prompt=prompt, max_tokens=2000, temperature=0, stream=True
    )
    for _ in range(tokens):
        next(iter(stream))
    assert server.wait_for(lambda running: running > 0), "it has ended before it could be left"
    stream.close()
    assert server.wait_for(lambda running: running == 0), "it runs on although nobody reads it"


def test_after_aborted_requests(
    server: Server, reference: Reference, prompts: list[list[int]], written: list[list[int]]
) -> None:
    abort(server, prompts[27], tokens=1)
    got = [complete(server.client(), prompt) for prompt in prompts[27:30]]
    reference.assert_equal("operated, after an aborted answer", prompts[27:30], written[27:30], got)

    new = reference.prompts(1, 5000, 5000, seed=9)
    want = reference.write(new, SPARSE)
    before = server.metric("vllm:generation_tokens_total")
    abort(server, new[0], tokens=0)
    assert server.metric("vllm:generation_tokens_total") == before
    got = [complete(server.client(), new[0])]
    reference.assert_equal("operated, after its own prompt was aborted half-way", new, want, got)


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
    reference.summary.append(
        "streaming, chat completions, stop strings, logprobs: one answer, as it should be"
    )


def test_logprobs_are_those_of_the_operated_model(
    server: Server, reference: Reference, prompts: list[list[int]]
) -> None:
    prompt = prompts[-6]
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
    got = answer.choices[0].logprobs.token_logprobs[0]
    reference.summary.append(
        f"log-probability after {len(prompt)} tokens: {got:.6f}, generate() has {want:.6f}"
    )
    # Keys that tie to rounding may lie in other pages, and then the error is more than that of a sum.
    assert got == pytest.approx(want, abs=1e-3)


def test_bad_requests_are_refused_and_the_server_lives_on(server: Server, reference: Reference) -> None:
    path, prompt = "/v1/completions", "Once upon a time"
    statuses = [
        post(server, path, b"{not json"),
        post_json(server, path),
        post_json(server, path, prompt=prompt, max_tokens=-1),
        post_json(server, path, prompt=prompt, temperature="hot"),
        post_json(server, path, prompt=reference.text[:8193], max_tokens=1),  # the model's context is 8,192
        post_json(server, path, prompt=[[5000]], max_tokens=1),
        post_json(server, path, model="another", prompt=prompt),
    ]
    reference.summary.append(f"malformed and over-long requests: {statuses}, and the server answers the next")
    assert all(400 <= status < 500 for status in statuses)
    assert post_json(server, path, prompt=prompt, max_tokens=1) == 200


def test_counters_are_logged(server: Server) -> None:
    lines = [line for line in server.text().splitlines() if "far density" in line]
    assert lines, "no counters in the log"
    densities = [float(line.split("far density ")[1].split(",")[0]) for line in lines]
    assert max(densities) > 0 and all(0 <= density < 0.5 for density in densities)
    assert any("dense fallbacks" in line and "pages read" in line for line in lines)
