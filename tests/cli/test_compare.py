"""``llama-surgery compare`` and ``llama-surgery gate``."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tests.cli.runner import SMALL, run
from transformers import AutoModelForCausalLM

from llama_surgery import SurgeryConfig
from llama_surgery.cli import compare_processes
from llama_surgery.cli.compare_processes import Outcome, measure_in_processes
from llama_surgery.surgery.adapter import write_adapter
from llama_surgery.topology.router import PageRouter


def test_compare_resumes_and_feeds_the_gate(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    small = ["--length", "256", "--windows", "1", "--needles", "2", "--needle-length", "256"]
    small += ["--needle-variant", "one-fact", "--density", "0.7", *SMALL]
    given = ["compare", model, "--text", text, "--calibration-text", text, "--out", folder, *small]
    done = run(*given, "--rule", "streaming")
    assert done.exit_code == 0, done.output
    for told in ("sink + window (StreamingLLM)", "needles kept", "comparison.csv"):
        assert told in done.stdout
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    forms = [row["form"] for row in results["rows"]]
    assert forms[0] == "dense" and set(forms[1:]) == {"streaming"} and len(forms) >= 6
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        assert [row["form"] for row in csv.DictReader(file)] == forms
    assert (folder / "comparison.svg").read_text(encoding="utf-8").startswith("<svg")

    merged = run(*given, "--seconds", "0", "--json")
    assert merged.exit_code == 0 and json.loads(merged.stdout)["rows"] == results["rows"]
    other = run(*given, "--seed", "1")
    assert other.exit_code == 1 and "seed: 0 there, 1 now" in other.stderr

    judged = ["gate", folder / "results.json", "--rule", "streaming"]
    assert run(*judged, "--max-perplexity-ratio", "100").exit_code == 0
    closed = run(*judged, "--max-perplexity-ratio", "0.5", "--max-needle-loss", "2", "--json")
    assert closed.exit_code == 3
    assert len(json.loads(closed.stdout)["failures"]) == len(forms) - 1


@pytest.mark.slow
def test_processes_compare_what_one_does(model: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as this process has: the same sums
    small = ["--length", "256", "--windows", "1", "--needles", "2", "--needle-length", "256"]
    small += ["--needle-variant", "one-fact", "--density", "0.7", "--device", "cpu", *SMALL]
    given = ["compare", model, "--text", text, "--calibration-text", text, *small]
    given += ["--rule", "streaming", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*given, one).exit_code == 0
    # Something in the way of one rule: what comes before it is finished.
    budgets = two / "budgets" / "streaming.json"
    budgets.parent.mkdir(parents=True)
    budgets.write_text('{"adapter": "another", "floor": 0.1, "targets": [0.1]}', encoding="utf-8")
    hindered = run(*given, two, "--processes", "3")
    assert hindered.exit_code == 1, hindered.output
    assert hindered.stderr.count("compared another adapter") == 1 and "Traceback" not in hindered.stderr
    assert "Not everything is finished" in hindered.stderr
    assert [file.name for file in (two / "cells").glob("[!d]*")] == []
    assert "dense: perplexity" in hindered.stdout

    budgets.unlink()
    resumed = run(*given, two, "--processes", "2")
    assert resumed.exit_code == 0, resumed.output
    assert "Cell 3 finished: streaming-" in resumed.stderr
    assert "Not everything" not in resumed.stderr
    assert _rows(two) == _rows(one)

    refused = run(*given, two, "--processes", "2", "--seed", "1")
    assert refused.exit_code == 1 and refused.stderr.count("seed: 0 there, 1 now") == 1
    assert not refused.stdout


def _rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a comparison without the time that they took."""
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_processes_do_not_share_a_pipe(model: Path, text: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    given = ["--text", tmp_path / "pipe", "--calibration-text", text, "--out", tmp_path / "out"]
    result = run("compare", model, *given, "--processes", "2")
    assert result.exit_code == 1 and "which only one process can read" in result.stderr


def test_processes_that_end_early_are_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare_processes, "_work", _ends_early)
    killed, finished, failed = measure_in_processes([["dense"], ["quest"], ["duo"]], folder=tmp_path)
    assert "SIGKILL" in killed.error and "memory" in killed.error
    assert finished == Outcome()
    assert failed.error == "the process ended with exit code 3."


def _ends_early(tell, index: int, count: int, forms: list[str], **asked) -> None:
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if index == 2:
        os._exit(3)
    tell.send(Outcome())


@pytest.mark.parametrize(
    ("device", "devices"),
    [
        ("auto", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", ["cuda:1"] * 3),
    ],
)
def test_processes_take_gpus_in_turn(device: str, devices: list[str], monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [compare_processes._device_of(index, device) for index in range(3)] == devices
    assert taken == ([] if device == "cuda:1" else [0, 1, 0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compare_processes._device_of(1, "auto") == "auto"


def test_an_adapter_is_compared(model: Path, text: Path, tmp_path: Path) -> None:
    adapter, folder = tmp_path / "adapter", tmp_path / "compared"
    llm = AutoModelForCausalLM.from_pretrained(model)
    config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, summary="page")
    write_adapter(adapter, llm, config, {1: PageRouter(offset=torch.tensor([[0.2, -0.2], [0.1, -0.1]]))})
    small = [
        "--length",
        "256",
        "--windows",
        "1",
        "--needles",
        "1",
        "--needle-length",
        "256",
        "--density",
        "0.7",
    ]
    given = ["compare", model, "--text", text, "--calibration-text", text, "--out", folder, *small]
    given += ["--needle-variant", "one-fact", "--rule", "learned"]
    refused = run(*given)
    assert refused.exit_code == 2 and "--adapter" in refused.stderr
    done = run(*given, "--adapter", adapter)
    assert done.exit_code == 0, done.output
    assert "pages, tile 16, learned (this package)" in done.stdout
    assert json.loads((folder / "budgets" / "learned.json").read_text(encoding="utf-8"))["adapter"]
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        dense, *learned = csv.DictReader(file)
    assert float(dense["summary_density"]) == 0 and learned[-1]["target_density"] == "1.0"
    for row in learned[:-1]:
        assert f"{float(row['total_density']) + float(row['summary_density']):.1%}" in done.stdout
        assert float(row["summary_density"]) > 0


def test_the_gate_reads_what_evaluate_wrote(model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    samples = ["--length", "512", "--windows", "2"]
    assert run("evaluate", model, "--text", text, *samples, "--out", path, *SMALL).exit_code == 0
    passed = run("gate", path, "--max-perplexity-ratio", "100")
    assert passed.exit_code == 0 and "Within the limits: T = 16" in passed.stdout
    unmeasured = run("gate", path, "--max-needle-loss", "0.1")
    assert unmeasured.exit_code == 3 and "was not measured" in unmeasured.stdout
    assert run("gate", path, "--max-needle-loss", "0.1", "--density", "0.2").exit_code == 1


def test_wrong_usage(model: Path, text: Path, tmp_path: Path) -> None:
    given = ["compare", model, "--text", text, "--calibration-text", text, "--out", tmp_path / "out"]
    assert run(*given, "--processes", "0").exit_code == 2
    assert run(*given, "--rule", "nonsense").exit_code == 2
    assert run("gate", tmp_path / "r.json").exit_code == 2
    empty = run(*given, "--seconds", "0")
    assert empty.exit_code == 1 and "holds no comparison" in empty.stderr
