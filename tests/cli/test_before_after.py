"""benchmarks/before_after.py: two states of the source in turns."""

import csv
import subprocess
import sys
from pathlib import Path

from benchmarks.before_after import CALLS, in_turns
from tests.conftest import ROOT
from transformers import AutoModelForCausalLM

import llama_surgery
from llama_surgery.config import SurgeryConfig


class _Side:
    """Answers what a side's process would: times that fall on one and rise on the other."""

    def __init__(self, times: list[float], end: list[float]) -> None:
        self.times, self.end, self.asked = times, end, 0

    def measure(self, part: str) -> dict[str, object]:
        self.asked += 1
        return {"ms": self.times[self.asked - 1], "far": 0.05, "end": self.end}


def test_the_ratio_is_the_median_of_turns_of_which_the_first_does_not_count() -> None:
    """Of a turn's calls the fastest counts."""

    def turns(*fastest: float) -> list[float]:
        return [ms for each in fastest for ms in (*[each + 5] * (CALLS - 1), each)]

    sides = {
        "before": _Side(turns(99, 10, 20, 30), [3.0, 4.0]),
        "after": _Side(turns(1, 11, 20, 60), [3.0, 4.5]),
    }
    row = in_turns(sides, "prompt", 3)  # type: ignore[arg-type]
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (1.1, 1.0, 2.0)
    assert (row["before_ms"], row["after_ms"], row["apart"]) == (20, 20, 0.1)


def test_two_states_are_measured_and_compared(model: Path, text: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = SurgeryConfig(window=32, chunk_size=64, page_size=16, tile=32, theta=0.05, dense_until=64)
    llama_surgery.operate(loaded, config)
    llama_surgery.save_adapter(loaded, tmp_path / "adapter")
    out = tmp_path / "found.csv"
    asked = [str(model), "--before", str(ROOT / "src"), "--adapter", str(tmp_path / "adapter")]
    asked += ["--text", str(text), "--length", "512", "--turns", "1", "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, str(ROOT / "benchmarks" / "before_after.py"), *asked, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: slower by more than a busy machine's noise
    with out.open(encoding="utf-8", newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"prompt", "steps", "sparse steps", "gradients"}
    assert all(float(row["apart"]) == 0 and 0 < float(row["far_density"]) < 1 for row in rows.values())
    assert rows["prompt"]["after"] == "working tree"


def test_a_state_that_is_none_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "before_after.py"),
        str(model),
        "--before",
        "no-such",
    ]
    command += ["--adapter", str(ROOT / "demo/adapters/books-26m"), "--text", str(text), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and "no-such is neither a folder nor a commit" in done.stderr
