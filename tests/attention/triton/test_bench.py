"""What the benchmark of prefill times: every part runs, checks its answer and leaves its row."""

import platform
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.timing import prefill, prefill_case
from benchmarks.timing.measure import Deadline, environment

from llama_surgery.config import SurgeryConfig


def test_prefill(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_case, "DIM", 16)
    monkeypatch.setattr(prefill, "FLEX_LIMIT", 0)
    config = SurgeryConfig(
        chunk_size=64,
        page_size=16,
        window=32,
        tile=32,
    )
    setting = prefill.Setting(config, 0.1, parts=True)
    given = {"device": device, "dtype": torch.float32}
    out = tmp_path / "p.csv"
    rows = prefill.bench_prefill([(192, (2, 3))], lambda *_: [setting], out, deadline=Deadline(100), **given)
    found = {row["part"]: row for row in rows}
    assert {
        "layout",
        "selection",
        "near field",
        "far pages",
        "far pages, scattered",
    } < found.keys()
    whole = found["attention with layout and selection"]
    assert 0.05 < whole["executed_far"] < 0.2 and whole["error"] < 1e-5 and whole["differing"] == 0
    assert (whole["n"], whole["heads"], whole["kv_heads"]) == (192, 6, 2)
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(rows) + 1


def test_versions_do_not_depend_on_what_the_packages_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0+git1a2b3c4d")
    monkeypatch.setattr("torch.__version__", "2.12.0a0+nv")
    told = environment(torch.device("cpu"))
    assert (told["triton"], told["torch"]) == ("3.6.0+git1a2b3c4d", "2.12.0a0+nv")
    assert told["device"] == platform.machine()
