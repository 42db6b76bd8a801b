"""Sparse prompts with dense decode steps, the default: the engine's own attention beside the plugin's."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import NEW, SPARSE, Reference, Server, complete, exported

from llama_surgery import eject, operate
from llama_surgery.surgery.compat import CACHE_NAME

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

CONFIG = dataclasses.replace(SPARSE, theta_decode=0.0)


def second_turn(reference: Reference, prompt: list[int], new: int, more: list[int]) -> list[list[int]]:
    """What generate() answers to a prompt, and to that, the answer and ``more``: whole chunks come from the
    first turn's cache, as with an engine."""
    operate(reference.model, CONFIG)
    try:
        ids = torch.tensor([prompt])
        options = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
        }
        first = reference.model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        cache, answer = first[CACHE_NAME], first.sequences[0, len(prompt) :].tolist()
        cache.crop((len(prompt) + new - 1) // CONFIG.chunk_size * CONFIG.chunk_size)
        talk = torch.tensor([prompt + answer + more])
        options |= {CACHE_NAME: cache, "max_new_tokens": NEW, "min_new_tokens": NEW}
        second = reference.model.generate(talk, **options)
    finally:
        eject(reference.model)
    return [answer, second.sequences[0, talk.shape[1] :].tolist()]


def test_dense_decode(reference: Reference, demo_model_path: Path, tmp_path: Path) -> None:
    """Mixed steps, preemptions, and chunks that decode steps filled before a prompt reads them sparsely."""
    folder = exported(reference.model, demo_model_path, tmp_path, CONFIG)
    prompts = [reference.prompts(1, n, n, seed=n)[0] for n in (60, 700, 1000, 1010, 2020, 2030, 1500, 1510)]
    want = reference.write(prompts, CONFIG, 4 * NEW)
    opening, more = reference.prompts(2, 560, 561, seed=3)
    turns = second_turn(reference, opening, 480, more)
    small = ("--num-gpu-blocks-override", "16", "--max-model-len", "4096")
    server = Server(folder, tmp_path / "log.txt", *small).start()
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt, 4 * NEW), prompts))
        preempted = server.metric("vllm:num_preemptions_total")
        answer = complete(server.client(), opening, 480)
        hits = server.metric("vllm:prefix_cache_hits_total")
        talk = opening + turns[0] + more
        answers = [answer, complete(server.client(), talk)]
        assert server.metric("vllm:prefix_cache_hits_total") - hits == 2 * CONFIG.chunk_size
    finally:
        server.kill()
    assert preempted > 0
    what = f"dense decode steps, 8 at once, {preempted:.0f} preemptions"
    reference.assert_equal(what, prompts, want, got)
    what = "an answer, and a turn that finds it in the cache"
    for asked, expected, given in zip((opening, talk), turns, answers, strict=True):
        reference.assert_equal(what, [asked], [expected], [given])
