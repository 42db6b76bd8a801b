"""With the full budget an operated model is the dense one, to the last sample, on a model that can answer."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_surgery import SurgeryConfig
from llama_surgery.evaluation.evaluate import evaluate
from llama_surgery.evaluation.long_generation import long_generation
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.run import run_ruler
from llama_surgery.evaluation.ruler.tasks import TASKS, Sampler

VARIANTS = ("one-fact", "sixteen-facts", "two-asked")
FULL = {"full": SurgeryConfig(chunk_size=128, page_size=32, window=64, tile=32, theta=0.0, theta_decode=0.0)}


@pytest.fixture(scope="module")
def demo(demo_model_path):
    return AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32).eval()


@pytest.mark.slow
def test_texts_and_needles(demo, tokenizer, texts) -> None:
    result = evaluate(
        demo,
        tokenizer,
        eval_texts=texts,
        length=640,
        windows=1,
        needles=3,
        needle_variants=VARIANTS,
        configs=FULL,
    )
    assert result.answers["full"] == result.answers[DENSE]
    assert sum(result.answers[DENSE]) > 0  # a model that answers nothing would be equal too
    (full,) = result.operated
    assert full.density["total_density"] == pytest.approx(1)
    assert full.ratio.ratio == pytest.approx(1, abs=1e-5)
    assert full.kl < 1e-6 and full.top1 == 1
    assert {prompt.variant for prompt in result.needles} == set(VARIANTS)


@pytest.mark.slow
def test_long_texts_and_ruler(demo, tokenizer, texts, monkeypatch) -> None:
    written = long_generation(demo, tokenizer, texts=texts, length=320, new_tokens=16, count=1, configs=FULL)[
        "full"
    ]
    assert written["agreement"] == 1 and written["first_difference"] == [None]
    tasks = ["niah_single_2", "vt"]
    for task in tasks:
        monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], new_tokens=8))
    sampler = Sampler(tokenizer, Materials.of())
    result = run_ruler(demo, sampler, configs=FULL, tasks=tasks, lengths=[640], samples=1)
    for task in tasks:
        dense, full = (result.cell(name, task, 640) for name in (DENSE, "full"))
        assert full.answers == dense.answers and full.scores == dense.scores
