"""Whole runs: self-check, resuming, and full budget against dense."""

import dataclasses
import json
import time
from contextlib import nullcontext

import pytest
import torch

import llama_surgery
from llama_surgery import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.kept import Kept
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler import run
from llama_surgery.evaluation.ruler.run import answer_samples, run_ruler
from llama_surgery.evaluation.ruler.tasks import TASKS, Sampler
from llama_surgery.topology.router import PageRouter

SPARSE = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=10.0, theta_decode=5.0)
FULL = dataclasses.replace(SPARSE, theta=0.0, theta_decode=0.0)
TINY = {"tasks": ["vt", "fwe"], "lengths": [640], "samples": 4}


@pytest.fixture
def sampler(tokenizer, materials) -> Sampler:
    return Sampler(tokenizer, materials, seed=3)


@pytest.mark.parametrize(("said", "score"), [("references", 100), ("nothing", 0)])
def test_an_oracle_scores_100_on_every_task_and_a_blank_answer_0(
    said, score, tiny_llama, sampler, monkeypatch
) -> None:
    def handed(model, tokenizer, samples, batch_size=1):
        return [", ".join(sample.references) if said == "references" else "" for sample in samples]

    monkeypatch.setattr(run, "answer_samples", handed)
    result = run_ruler(tiny_llama, sampler, configs={}, tasks=list(TASKS), lengths=[1536, 2048], samples=3)
    rows = result.rows()
    assert len(rows) == 2 * 13 and all(row["samples"] == 3 for row in rows)
    assert {row["score"] for row in rows} == {score}
    assert result.complete


def test_full_budget_scores_what_dense_scores_to_the_last_sample(tiny_llama, sampler, monkeypatch) -> None:
    """Random weights score nothing, so what is written is compared, word for word."""
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, new_tokens=8))
    given = {"lengths": [1536], "samples": 1}
    result = run_ruler(tiny_llama, sampler, configs={"full": FULL}, tasks=list(TASKS), **given)
    for task in TASKS:
        dense, full = (result.cell(name, task, 1536) for name in (DENSE, "full"))
        assert full.answers == dense.answers and full.scores == dense.scores
        assert result.density("full", task=task) == pytest.approx(1)
    # Less than the full budget writes something else, so that equality means something.
    sparse = run_ruler(tiny_llama, sampler, configs={"sparse": SPARSE}, tasks=["fwe"], **given)
    assert sparse.cell("sparse", "fwe", 1536).answers != sparse.cell(DENSE, "fwe", 1536).answers
    assert sparse.density("sparse") < 0.9
    assert not llama_surgery.is_operated(tiny_llama)


def test_an_answer_ends_with_its_last_reference_and_scores_as_if_it_had_gone_on(tiny_llama, sampler) -> None:
    (sample,) = sampler.samples("vt", 640, [0])
    (whole,) = answer_samples(tiny_llama, sampler.tokenizer, [sample])
    wanted = dataclasses.replace(sample, references=(whole[:6],))
    (short,) = answer_samples(tiny_llama, sampler.tokenizer, [wanted])
    assert whole.startswith(short) and len(short) < len(whole)
    assert wanted.score(short) == wanted.score(whole) == 1


def test_batches_answer_as_single_samples_do(tiny_llama, sampler) -> None:
    samples = sampler.samples("fwe", 640, range(3))
    assert len({sample.tokens for sample in samples}) > 1  # so that there is padding
    for config in (None, SPARSE):
        with nullcontext() if config is None else llama_surgery.operated(tiny_llama, config):
            single = answer_samples(tiny_llama, sampler.tokenizer, samples)
            assert answer_samples(tiny_llama, sampler.tokenizer, samples, batch_size=3) == single


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_without_answering_twice(
    tiny_llama, sampler, tmp_path, monkeypatch
) -> None:
    asked = []

    def answers(model, tokenizer, samples, batch_size=1):
        if len(asked) == stop:
            raise Interrupted
        asked.extend((llama_surgery.is_operated(model), s.task, s.index) for s in samples)
        return [f"{sample.index} {sample.references[0]}" for sample in samples]

    monkeypatch.setattr(run, "answer_samples", answers)
    monkeypatch.setattr(run, "TURN", 2)
    settings, kept = {**TINY, "configs": {"sparse": SPARSE}}, {"kept": Kept(tmp_path)}
    stop = 6
    with pytest.raises(Interrupted):
        run_ruler(tiny_llama, sampler, **settings, **kept)
    assert not llama_surgery.is_operated(tiny_llama)
    late = run_ruler(tiny_llama, sampler, **settings, **kept, deadline=time.monotonic() - 1)
    assert sum(len(cell.scores) for cell in late.cells) == 6 and not late.complete
    stop = None
    result = run_ruler(tiny_llama, sampler, **settings, **kept)
    assert result.complete and len(asked) == len(set(asked)) == 2 * 2 * 4
    assert run_ruler(tiny_llama, sampler, **settings).cells == [
        dataclasses.replace(cell, seconds=pytest.approx(cell.seconds, abs=60)) for cell in result.cells
    ]
    asked.clear()
    assert run_ruler(tiny_llama, sampler, **settings, **kept).rows() == result.rows() and not asked
    more = run_ruler(tiny_llama, sampler, **{**settings, "samples": 6}, **kept)
    assert more.complete and sorted({index for _, _, index in asked}) == [4, 5]
    # Without a first turn, what lies behind it is not taken for it.
    next(f for f in tmp_path.rglob("*.json") if json.loads(f.read_text())["answers"][0][:2] == "0 ").unlink()
    late = run_ruler(tiny_llama, sampler, **settings, **kept, deadline=time.monotonic() - 1)
    assert sorted(len(cell.scores) for cell in late.cells) == [0, 4, 4, 4]


def test_answers_of_other_settings_are_not_gone_on_with(tiny_llama, sampler, tmp_path, monkeypatch) -> None:
    asked = []

    def answers(model, tokenizer, samples, batch_size=1):
        asked.append(batch_size)
        return [""] * len(samples)

    monkeypatch.setattr(run, "answer_samples", answers)
    given = {**TINY, "tasks": ["vt"], "configs": {"sparse": SPARSE}, "kept": Kept(tmp_path)}
    run_ruler(tiny_llama, sampler, **given)
    routers = {0: PageRouter(offset=torch.zeros(2, 2))}
    for changed, again in (
        ({}, 0),
        ({"configs": {"sparse": FULL}}, 1),  # the dense answers are the same
        ({"routers": {"sparse": routers}}, 1),
        ({"batch_size": 2}, 2),
        ({"tasks": ["fwe", "vt"]}, 2),
    ):
        asked.clear()
        run_ruler(tiny_llama, sampler, **(given | changed))
        assert len(asked) == again, changed
    asked.clear()
    run_ruler(tiny_llama, Sampler(sampler.tokenizer, sampler.materials, seed=4), **given)
    assert len(asked) == 2


def test_a_deadline_ends_the_run_between_turns(tiny_llama, sampler, monkeypatch) -> None:
    monkeypatch.setattr(run, "answer_samples", lambda model, tokenizer, samples, size: [""] * len(samples))
    given = {**TINY, "configs": {}}
    late = run_ruler(tiny_llama, sampler, **given, deadline=time.monotonic() - 1)
    assert not any(cell.scores for cell in late.cells) and not late.complete
    assert run_ruler(tiny_llama, sampler, **given, deadline=time.monotonic() + 1e6).complete


def test_what_cannot_be_run_is_refused_before_anything_is_answered(tiny_llama, sampler, monkeypatch) -> None:
    monkeypatch.setattr(run, "answer_samples", None)
    with pytest.raises(TextError, match="task 'vtt'"):
        run_ruler(tiny_llama, sampler, configs={}, tasks=["vt", "vtt"], lengths=[640])
    with pytest.raises(TextError, match="qa_2: 61 samples"):
        run_ruler(tiny_llama, sampler, configs={}, tasks=["vt", "qa_2"], lengths=[2048], samples=61)
    with pytest.raises(SurgeryError, match="0 samples"):
        run_ruler(tiny_llama, sampler, configs={}, tasks=["vt"], lengths=[640], samples=0)
    with pytest.raises(SurgeryError, match="4096 tokens: LlamaForCausalLM was made for 2048"):
        run_ruler(tiny_llama, sampler, configs={}, tasks=["vt"], lengths=[1024, 4096])
    with pytest.raises(SurgeryError, match="training mode"):
        run_ruler(tiny_llama.train(), sampler, configs={}, tasks=["vt"], lengths=[640])
