"""What the benchmark of decode times: every part runs, checks its answer and leaves its row."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.timing import decode, decode_case, decode_paged
from benchmarks.timing.measure import Deadline

from llama_surgery.errors import SurgeryError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KV_HEADS": 1, "HEADS": 2, "DIM": 32, "STEPS": 10}.items():
        monkeypatch.setattr(decode_case, name, value)


def test_decode(device: torch.device, tmp_path: Path) -> None:
    setting = decode_case.Setting(1537, 1, far=0.2)
    out = tmp_path / "decode.csv"
    deadline = Deadline(100)
    rows = decode.bench_decode((setting,), out, deadline=deadline, device=device, dtype=torch.float32)
    found = {row["part"]: row for row in rows}
    assert {"decode", "step", decode.ALL_NEAR} < found.keys()
    assert 0 < found["decode"]["executed_far"] < 0.3 and found["decode"]["error"] < 1e-5
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(rows) + 1
    assert decode.bench_decode((setting,), out, deadline=Deadline(0), device=device) == []


def test_paged(device: torch.device, tmp_path: Path) -> None:
    setting = decode_case.Setting(2049, 3, far=0.2, ragged=True)
    assert setting.lengths == [2049, 181, 16]
    out, deadline = tmp_path / "paged.csv", Deadline(100)
    rows = decode.bench_decode((setting,), out, deadline=deadline, device=device, dtype=torch.float32)
    assert [row["part"] for row in rows] == ["contiguous", "paged"] and rows[1]["error"] < 1e-5
    assert rows[1]["tokens"] == 2246 and 0 < rows[1]["executed_far"] < 0.5
    layers, _ = decode_case.build(setting, 1, device, torch.float32)
    scattered = decode_paged.paged(layers[0], decode_paged.block_tables(setting, device))
    scattered.cache.keys[0, 0, scattered.cache.table[0, 0]] += 1.0
    with pytest.raises(SurgeryError, match="paged cache differs"):
        decode_paged.same(setting, layers, [scattered])
