"""What is made of scores: intervals, worst tasks, files."""

import csv

import pytest

from llama_surgery.evaluation.intervals import paired_change
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import Cell, RulerResult
from llama_surgery.evaluation.ruler.tasks import string_match_all, string_match_part
from llama_surgery.files import write_csv

SETTINGS = {
    "model": "m",
    "configs": {"T = 32": {}},
    "tasks": ["vt", "fwe"],
    "lengths": [4096, 8192],
    "samples": 4,
    "seed": 0,
}


@pytest.fixture
def result() -> RulerResult:
    scores = {
        (DENSE, "vt", 4096): [1, 1, 1, 0],
        ("T = 32", "vt", 4096): [1, 0, 0, 0],
        (DENSE, "vt", 8192): [1, 1, 1, 1],
        ("T = 32", "vt", 8192): [1, 1],
        (DENSE, "fwe", 4096): [1, 0, 0, 0],
        ("T = 32", "fwe", 4096): [1, 0, 0, 1],
    }
    cells = [
        Cell(name, task, length, [float(s) for s in values], ["x"] * len(values), 2.0)
        for (name, task, length), values in scores.items()
    ]
    return RulerResult(SETTINGS, cells)


def test_scores_count_references_whatever_the_case() -> None:
    assert string_match_all("It is ABC, and d.", ["abc", "D", "e", "it"]) == 0.75
    assert string_match_part("It is abc.", ["e", "ABC"]) == 1
    assert string_match_part("", ["e"]) == string_match_all("", ["e"]) == 0


def test_changes_pair_the_samples_that_both_have_answered(result) -> None:
    by_task = result.changes("T = 32", "task")
    assert by_task["vt"].count == 6 and by_task["vt"].lost == 2
    assert by_task["vt"].difference == pytest.approx(-2 / 6)
    assert by_task["fwe"].difference == 0.25
    assert result.to_dict()["summaries"]["T = 32"]["by_task"]["vt"]["lost"] == 2
    at_4k = result.changes("T = 32", "task", length=4096)
    assert at_4k["vt"].difference == -0.5
    # Two intervals that hold together are wider than one.
    alone = paired_change([([1.0, 1, 1, 0], [1.0, 0, 0, 0])])
    assert at_4k["vt"].low < alone.low and at_4k["vt"].high > alone.high
    assert result.average("T = 32", length=4096).difference == pytest.approx((-0.5 + 0.25) / 2)
    assert result.average("T = 32", tasks=["cwe"]) is None
    assert not result.complete


def test_by_length_every_task_counts_alike(result) -> None:
    by_length = result.changes("T = 32", "length")
    assert by_length[4096].difference == pytest.approx(-0.125)
    assert by_length[8192].difference == 0


def test_rows_are_in_points_with_intervals(result, tmp_path) -> None:
    path = tmp_path / "ruler.csv"
    write_csv(path, result.rows())
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    dense, operated = rows[0], rows[1]
    assert float(dense["score"]) == 75 and dense["difference"] == ""
    assert 0 < float(dense["score_low"]) < 75 < float(dense["score_high"]) < 100
    assert float(operated["difference"]) == -50 and operated["lost"] == "2"
    assert float(operated["difference_low"]) < -50 < float(operated["difference_high"])
