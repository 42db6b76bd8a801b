"""Verdicts go by bounds, and by what the dense model can do."""

import dataclasses

import pytest

from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import Cell, RulerResult
from llama_surgery.evaluation.verdict import (
    MEASURES,
    Finding,
    Limits,
    ruler_findings,
    text_finding,
    unmeasured,
    verdict,
)

LIMITS = Limits(perplexity=0.01, average=0.03, single=0.1)


def ratio(low: float, high: float, count: int = 12) -> dict:
    return {"ratio": (low + high) / 2, "low": low, "high": high, "count": count}


@pytest.mark.parametrize(
    ("low", "high", "state"), [(0.99, 1.0099, "kept"), (1.005, 1.02, "open"), (1.011, 1.02, "exceeded")]
)
def test_perplexity_goes_by_its_interval(low, high, state) -> None:
    assert text_finding(8192, ratio(low, high), LIMITS).state == state


def test_few_windows_decide_nothing() -> None:
    finding = text_finding(8192, ratio(1.0, 1.0, count=9), LIMITS)
    assert not finding.trusted and finding.state == "open"


def result(lost: dict[str, int], samples: int = 200, dense: float = 1.0) -> RulerResult:
    """So many answers of each task lost, half of the samples at either length."""
    settings = {"configs": {"operated": {}}, "tasks": list(lost), "lengths": [1, 2], "samples": samples // 2}
    cells = []
    for task, count in lost.items():
        operated = [0.0] * count + [dense] * (samples - count)
        for length, part in ((1, slice(None, None, 2)), (2, slice(1, None, 2))):
            cells.append(Cell(DENSE, task, length, [dense] * len(operated[part])))
            cells.append(Cell("operated", task, length, operated[part]))
    return RulerResult(settings, cells)


def test_ruler_is_judged_on_average_by_task_and_by_length() -> None:
    average, worst, length = ruler_findings(result({"vt": 40, "fwe": 0}), "operated", LIMITS)
    assert average.loss == pytest.approx(0.1) and average.state == "exceeded" and average.count == 400
    assert worst.task == "vt" and worst.loss == pytest.approx(0.2)
    assert 0.1 < worst.low < 0.2 < worst.high and worst.state == "exceeded"
    assert length.length in (1, 2) and length.loss == pytest.approx(0.1) and length.state == "open"
    assert length.count == 200
    assert {f.state for f in ruler_findings(result({"vt": 0, "fwe": 0}), "operated", LIMITS)} == {"kept"}


def test_few_samples_leave_it_open_even_where_nothing_was_lost() -> None:
    findings = ruler_findings(result({"vt": 0, "fwe": 0}, samples=8), "operated", LIMITS)
    assert all(finding.loss == 0 and finding.state == "open" for finding in findings)


def test_bounds_of_the_worst_task_are_those_of_any_task() -> None:
    """A task with few samples may have lost more than the one that is known to have lost most."""
    both = result({"vt": 10, "fwe": 30})
    both.cells = both.cells[2:]  # vt at one length only
    both.cells[0].scores, both.cells[1].scores = [1.0] * 4, [1.0] * 4
    worst, by_task = ruler_findings(both, "operated", LIMITS)[1], both.changes("operated", "task")
    assert worst.task == "fwe"
    assert worst.low == -by_task["fwe"].high and worst.high == -by_task["vt"].low


def test_what_dense_cannot_do_does_not_count() -> None:
    assert ruler_findings(result({"vt": 0}, dense=0.05), "operated", LIMITS) == []


def test_verdict_needs_every_measure() -> None:
    kept = Finding(measure="perplexity", length=1, loss=0, low=0, high=0, limit=1, count=1)
    all_kept = [dataclasses.replace(kept, measure=m) for m in MEASURES]
    assert verdict(all_kept) == "kept"
    assert verdict(all_kept[:3]) == "open" and unmeasured(all_kept[:3]) == ["RULER worst length"]
    assert verdict([]) == "open"
    beyond = dataclasses.replace(kept, low=2, high=3)
    assert verdict([beyond]) == verdict([*all_kept, beyond]) == "exceeded"
    assert verdict([*all_kept, dataclasses.replace(kept, high=2)]) == "open"
