"""Planted facts through HTTP, by the command that measures them on a GPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import Server

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def asked(model: Path, url: str, adapter: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    text = tmp_path / "text"
    text.mkdir(exist_ok=True)
    book = (ROOT / "demo" / "text" / "evaluation.txt").read_text(encoding="utf-8")
    for number in range(2):  # one is for calibration
        (text / f"{number}.txt").write_text(book, encoding="utf-8")
    given = ["--adapter", adapter, "--url", url, "--text", text, "--length", "1500", "--facts", "6"]
    return subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "serving_facts.py", model, *given),
            *("--dtype", "float32", "--device", "cpu", "--tie", "1e-3", "--out", tmp_path / "facts.csv"),
        ],
        capture_output=True,
        text=True,
    )


def test_facts_are_answered_as_generate_answers_them(
    server: Server, sparse_folder: Path, demo_model_path: Path, tmp_path: Path, summary: list[str]
) -> None:
    adapter = sparse_folder.parent / "adapter"
    done = asked(demo_model_path, f"http://127.0.0.1:{server.port}", adapter, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "facts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["dense", "operated"]
    for row in rows:
        assert row["asked"] == "6" and row["beyond_tie"] == "0" and int(row["right"]) > 0
        assert abs(int(row["right_served"]) - int(row["right"])) <= int(row["differ"])
    summary.append(done.stdout.strip())


def test_nobody_there(demo_model_path: Path, sparse_folder: Path, tmp_path: Path) -> None:
    done = asked(demo_model_path, "http://127.0.0.1:9", sparse_folder.parent / "adapter", tmp_path)
    assert done.returncode == 1 and "Is a vLLM server running there?" in done.stderr
