"""Verification of a tiny model: shares of time, resuming, reasons for what is left out."""

import dataclasses
import json
import time

import pytest
import torch

import llama_surgery
from llama_surgery import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation import verify as room
from llama_surgery.evaluation.ruler import run
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.samples import Sampler
from llama_surgery.evaluation.verify import split_texts, verify

SPARSE = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.1, theta_decode=0.05)
FULL = dataclasses.replace(SPARSE, theta=0.0, theta_decode=0.0)
SMALL = {"lengths": [640, 768], "tasks": ["vt", "fwe"], "samples": 60, "windows": 10}


@pytest.fixture
def sampler(tokenizer) -> Sampler:
    return Sampler(tokenizer, Materials.of())


@pytest.fixture
def oracle(monkeypatch):
    """Answers are all references, of an operated model less what the test wants lost."""
    asked = []

    def answers(model, tokenizer, samples, batch_size=1):
        keep = share if llama_surgery.is_operated(model) else 1.0
        asked.extend(samples)
        return [" ".join(s.references) if s.index < keep * 60 else "" for s in samples]

    def lose(lost: float) -> list:
        nonlocal share
        share = 1 - lost
        return asked

    share = 1.0
    monkeypatch.setattr(run, "answer_samples", answers)
    return lose


def later(seconds: float = 1e6) -> float:
    return time.monotonic() + seconds


def test_full_budget_keeps_everything(tiny_llama, sampler, texts, oracle, tmp_path) -> None:
    given = {**SMALL, "texts": texts, "config": FULL, "folder": tmp_path}
    report = verify(tiny_llama, sampler, **given, deadline=later())
    assert report["verdict"] == "kept" and report["skipped"] == []
    assert [(f["measure"], f["length"]) for f in report["findings"]] == [
        ("perplexity", 640),
        ("perplexity", 768),
        ("RULER average", None),
        ("RULER worst task", None),
        ("RULER worst length", 640),
    ]
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"))["verdict"] == "kept"
    for name in ("model", "config", "seed", "versions"):
        assert name in report["settings"]
    # Again: nothing is measured twice.
    asked = oracle(0.0)
    asked.clear()
    seconds = report["text"]["640"]["dense"]["seconds_per_window"]
    again = verify(tiny_llama, sampler, **given, deadline=later())
    assert not asked and again["text"]["640"]["dense"]["seconds_per_window"] == seconds
    with pytest.raises(SurgeryError, match=r"other settings \(config: "):
        verify(tiny_llama, sampler, **{**given, "config": SPARSE}, deadline=later())


def test_losses_beyond_the_limits_are_told(tiny_llama, sampler, texts, oracle, tmp_path) -> None:
    oracle(0.4)
    given = {**SMALL, "lengths": [640], "texts": texts, "config": SPARSE, "folder": tmp_path}
    report = verify(tiny_llama, sampler, **given, deadline=later())
    assert report["verdict"] == "exceeded"
    states = {finding["measure"]: finding["state"] for finding in report["findings"]}
    assert states["RULER average"] == states["RULER worst task"] == "exceeded"
    assert not llama_surgery.is_operated(tiny_llama)


def test_time_and_context_that_are_lacking_are_told(tiny_llama, sampler, texts, oracle, tmp_path) -> None:
    lengths = {**SMALL, "lengths": [640, 768, 4096]}
    given = {**lengths, "texts": texts, "config": FULL, "folder": tmp_path}
    report = verify(tiny_llama, sampler, **given, deadline=later(-1))
    assert report["verdict"] == "open" and report["findings"] == []
    assert "4,096 tokens: LlamaForCausalLM was made for 2,048" in report["skipped"]
    assert {"640 tokens: time was over", "768 tokens: time was over"} <= set(report["skipped"])
    assert "RULER average: nothing was measured that counts" in report["skipped"]


def test_time_is_shared_out_over_the_lengths(
    tiny_llama, sampler, texts, oracle, tmp_path, monkeypatch
) -> None:
    ends = []

    def asked(*arguments, deadline, **settings):
        ends.append(deadline - start)
        return run.run_ruler(*arguments, deadline=start - 1, **settings)

    monkeypatch.setattr(room, "run_ruler", asked)
    start = time.monotonic()
    given = {**SMALL, "texts": texts, "config": FULL, "folder": tmp_path}
    report = verify(tiny_llama, sampler, **given, deadline=start + 2000)
    first, second = ends
    share = (640 + room.ANSWER_COST) / (640 + 768 + 2 * room.ANSWER_COST)
    assert first == pytest.approx(2000 * share, abs=60) and second == pytest.approx(2000, abs=60)
    told = "RULER at 640 tokens: 0 to 0 of 60 samples a task, then time was over"
    assert told in report["skipped"] and report["verdict"] == "open"


def test_memory_that_runs_out_ends_at_that_length(
    tiny_llama, sampler, texts, oracle, tmp_path, monkeypatch
) -> None:
    def evaluate(*arguments, length, **settings):
        if length == 768:
            raise torch.OutOfMemoryError("too large")
        return room_evaluate(*arguments, length=length, **settings)

    room_evaluate = room.evaluate
    monkeypatch.setattr(room, "evaluate", evaluate)
    given = {**SMALL, "texts": texts, "config": FULL, "folder": tmp_path}
    report = verify(tiny_llama, sampler, **given, deadline=later())
    assert "the rest at 768 tokens, and all beyond: out of memory" in report["skipped"]
    assert {row["length"] for row in report["ruler"]} == {640} and list(report["text"]) == ["640"]


def test_texts_too_short_for_a_length_are_told(tiny_llama, sampler, texts, oracle, tmp_path) -> None:
    given = {**SMALL, "texts": [texts[0][:2500]], "config": FULL, "folder": tmp_path, "samples": 1}
    report = verify(tiny_llama, sampler, **given, deadline=later())
    assert "perplexity at 768 tokens: the text holds no window of that length" in report["skipped"]


def test_split_texts_have_nothing_in_common() -> None:
    text = "\n\n".join(f"Paragraph {number}." for number in range(40))
    ((first,), (rest,)) = split_texts([text, "No paragraphs here."])
    assert first + "\n\n" + rest == text and 0.2 < len(first) / len(text) < 0.35
    with pytest.raises(TextError, match="cannot be split"):
        split_texts(["One paragraph."])
