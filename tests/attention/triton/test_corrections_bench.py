"""What the benchmark of corrections times: every part runs, checks its answer and leaves its row."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.timing import prefill_case
from benchmarks.timing.measure import Deadline

from benchmarks import corrections
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=32, theta=0.02)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STREAMS": 1, "HEADS": 2, "DIM": 16}.items():
        monkeypatch.setattr(corrections, name, value)
        monkeypatch.setattr(prefill_case, name, value)
    monkeypatch.setattr(corrections, "CHECKED", 130)
    monkeypatch.setattr(corrections, "CALLS", 1)


def test_corrections(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: corrections.VARIANTS[name] for name in ("plain", "all", "no summaries")}
    monkeypatch.setattr(corrections, "VARIANTS", chosen)
    given = {"device": device, "dtype": torch.float32, "density": 0.1}
    rows = corrections.bench_corrections(CONFIG, 130, tmp_path / "c.csv", deadline=Deadline(100), **given)
    assert [row["part"] for row in rows] == ["layout", "prefill", "decode"] * 3
    assert all(row["error"] < 1e-5 for row in rows) and rows[1]["executed_far"] > 0
    assert rows[0]["over_plain"] == rows[1]["over_plain"] == 1.0


def test_a_wrong_answer_is_not_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prefill_case.make_data(130, device, torch.float32)
    plain = corrections._decode

    def other(*arguments: object) -> object:
        result = plain(*arguments)  # type: ignore[arg-type]
        result.out.mul_(1.1)
        return result

    monkeypatch.setattr(corrections, "_decode", other)
    with pytest.raises(SurgeryError, match="wrong answer"):
        corrections.check(data, CONFIG, None)
