"""benchmarks/end_to_end.py on shapes small enough for a test."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.timing.end_to_end import Task, end_to_end
from benchmarks.timing.plot import plot_end_to_end
from tests.conftest import ROOT

from llama_surgery.config import SurgeryConfig


def test_a_model_is_measured_end_to_end(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "end_to_end.csv"
    config = SurgeryConfig(page_size=64, tile=64)
    task = Task(config, 1024, batch=2, density=0.08, decode_density=0.1, steps=5)
    given = {"seconds": 300.0, "device": torch.device("cpu"), "dtype": torch.float32}
    found = end_to_end(shapes, [task], out, **given)
    told = capsys.readouterr().out
    assert "logits differ" in told and "far density" in told
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["part"], r["side"]) for r in rows] == [
        ("prefill", "dense"),
        ("decode", "dense"),
        ("prefill", "operated"),
        ("decode", "operated"),
    ]
    assert all(float(r["p50_ms"]) > 0 and r["backend"] for r in rows)
    assert 0.04 < float(rows[2]["far_density"]) < 0.12
    assert 0 < float(rows[3]["far_density"]) < 0.3
    assert float(rows[3]["speedup"]) == pytest.approx(
        float(rows[1]["p50_ms"]) / float(rows[3]["p50_ms"]), rel=1e-2
    )
    plot_end_to_end(found, out.with_suffix(".svg"))
    assert out.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg")


def test_the_script_runs_without_the_command_line_and_keeps_its_time(shapes: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['typer'] = None; sys.modules['rich'] = None;"
        "sys.path.insert(0, sys.argv[1].rpartition('/')[0]);"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    script = ROOT / "benchmarks" / "end_to_end.py"
    given = ["--length", "512", "--seconds", "0", "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), str(shapes), *given, "--out", str(tmp_path / "r.csv")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "512 tokens is not run" in done.stdout and "0 rows" in done.stdout
