"""Verdicts go by bounds, and by what the dense model can do."""

import dataclasses
import json
from pathlib import Path

import pytest

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import Cell, RulerResult
from llama_surgery.evaluation.verdict import Finding, Limits, find, read_limits, verdict

RULER = Limits(ruler=0.03, ruler_single=0.1)


def measured(low: float, high: float, count: int = 12, lost: int = 0) -> dict:
    ratio = {"ratio": (low + high) / 2, "low": low, "high": high, "count": count}
    needles = [{"right": {DENSE: True, "operated": number >= lost}} for number in range(200)]
    return {"operated": [{"name": "operated", "ratio": ratio}], "needles": needles}


@pytest.mark.parametrize(
    ("low", "high", "state"), [(0.99, 1.0099, "kept"), (1.005, 1.02, "open"), (1.011, 1.02, "exceeded")]
)
def test_perplexity_goes_by_its_interval(low, high, state) -> None:
    (finding,) = find(measured(low, high), None, Limits(perplexity=0.01))
    assert finding.state == state and finding.loss == pytest.approx((low + high) / 2 - 1)


def test_few_windows_decide_nothing() -> None:
    (finding,) = find(measured(1.0, 1.0, count=9), None, Limits(perplexity=0.01))
    assert not finding.trusted and finding.state == "open"


@pytest.mark.parametrize(("lost", "state"), [(0, "kept"), (8, "open"), (40, "exceeded")])
def test_needles_go_by_the_interval_of_what_was_lost(lost: int, state: str) -> None:
    (finding,) = find(measured(1, 1, lost=lost), None, Limits(needles=0.05))
    assert finding.loss == pytest.approx(lost / 200) and finding.count == 200
    assert finding.low < finding.loss < finding.high and finding.state == state


def test_needles_that_are_gained_do_not_make_up_for_those_that_are_lost() -> None:
    found = measured(1, 1, lost=30)
    for needle in found["needles"][100:130]:
        needle["right"][DENSE] = False
    (finding,) = find(found, None, Limits(needles=0.05))
    assert finding.loss == pytest.approx(30 / 200)


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
    average, worst, length = find({}, result({"vt": 40, "fwe": 0}), RULER)
    assert average.loss == pytest.approx(0.1) and average.state == "exceeded" and average.count == 400
    assert worst.where == "vt" and worst.loss == pytest.approx(0.2)
    assert 0.1 < worst.low < 0.2 < worst.high and worst.state == "exceeded"
    assert length.where in "12" and length.loss == pytest.approx(0.1) and length.state == "open"
    assert length.count == 200
    assert {f.state for f in find({}, result({"vt": 0, "fwe": 0}), RULER)} == {"kept"}


def test_few_samples_leave_it_open_even_where_nothing_was_lost() -> None:
    findings = find({}, result({"vt": 0, "fwe": 0}, samples=8), RULER)
    assert all(finding.loss == 0 and finding.state == "open" for finding in findings)


def test_bounds_of_the_worst_task_are_those_of_any_task() -> None:
    """A task with few samples may have lost more than the one that is known to have lost most."""
    both = result({"vt": 10, "fwe": 30})
    both.cells = both.cells[2:]  # vt at one length only
    both.cells[0].scores, both.cells[1].scores = [1.0] * 4, [1.0] * 4
    worst, by_task = find({}, both, RULER)[1], both.changes("operated", "task")
    assert worst.where == "fwe"
    assert worst.low == -by_task["fwe"].high and worst.high == -by_task["vt"].low


def test_what_was_not_measured_or_what_dense_cannot_do_is_open() -> None:
    asked = Limits(perplexity=1, needles=1, ruler=1)
    found = [
        *find({}, result({"vt": 0}, dense=0.05), asked),
        *find(measured(1, 1) | {"needles": []}, None, asked),
    ]
    states = [(finding.measure, finding.state) for finding in found if finding.loss is None]
    assert states == [
        ("perplexity", "open"),
        ("needles", "open"),
        ("RULER average", "open"),
        ("needles", "open"),
        ("RULER average", "open"),
    ]


def test_every_limit_has_to_be_kept() -> None:
    kept = Finding(form="operated", measure="perplexity", loss=0, low=0, high=0, limit=1, count=1)
    beyond, between = dataclasses.replace(kept, low=2, high=3), dataclasses.replace(kept, high=2)
    assert verdict([kept, kept]) == "kept"
    assert verdict([]) == verdict([kept, between]) == "open"
    assert verdict([beyond]) == verdict([kept, between, beyond]) == "exceeded"


def test_limits_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    file.write_text(json.dumps({"perplexity": 0.02, "ruler_single": 0.1}), encoding="utf-8")
    assert read_limits(file) == Limits(perplexity=0.02, ruler_single=0.1)
    for wrong in (
        "{",
        "{}",
        "[1]",
        '{"speed": 2}',
        '{"needles": "few"}',
        '{"needles": "0.1"}',
        '{"needles": -1}',
    ):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(SurgeryError, match="one or more of perplexity, needles, ruler, ruler_single"):
            read_limits(file)
    with pytest.raises(SurgeryError, match="no limits"):
        read_limits(tmp_path / "nowhere")
