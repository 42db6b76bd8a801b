"""What the benchmark of decode times: every part runs, checks its answer and leaves its row."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.bench import decode, decode_case
from llama_surgery.bench.measure import Deadline


def test_decode(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KV_HEADS": 1, "HEADS": 2, "DIM": 32, "STEPS": 10}.items():
        monkeypatch.setattr(decode_case, name, value)
    setting = decode_case.Setting(1537, 1, far=0.2)
    out = tmp_path / "decode.csv"
    deadline = Deadline(100)
    rows = decode.bench_decode((setting,), out, deadline=deadline, device=device, dtype=torch.float32)
    found = {row["part"]: row for row in rows}
    assert {"decode", "step", "topology=dense"} < found.keys()
    assert 0 < found["decode"]["executed_far"] < 0.3 and found["decode"]["error"] < 1e-5
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(rows) + 1
    assert decode.bench_decode((setting,), out, deadline=Deadline(0), device=device) == []
