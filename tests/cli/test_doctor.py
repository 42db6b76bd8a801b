"""``doctor``: the whole command on shapes small enough for a test."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.runner import SMALL, run

from llama_surgery import SurgeryConfig
from llama_surgery.cli.doctor import _executor
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery import pays
from llama_surgery.surgery.operation import config_of
from llama_surgery.text import parse_length


def test_the_command_explains_itself() -> None:
    result = run("doctor", "--help")
    assert result.exit_code == 0 and len(result.output) > 500


def test_what_cannot_be_measured_is_said_in_a_line(shapes: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["doctor", tmp_path / "none.json"], "no such folder or file"),
        (["doctor", shapes, "--adapter", tmp_path], "an adapter is a folder with"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output
    for wanting in (["--write"], ["--text", tmp_path]):
        assert run("doctor", shapes, *wanting).exit_code == 2


def test_the_doctor_tells_of_the_loss_that_thresholds_were_set_for(
    model: Path, text: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    given = ["--text", text, "--max-loss", "20%", "--length", "512", *SMALL]
    made = run("operate", model, "--out", adapter, *given, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)["measured_loss"]
    assert told["max_loss"] == 0.2 and told["high"] <= 0.2 and told["length"] == 512
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["measured_loss"] == told and saved["surgery"]["theta"] > 0.1
    asked = run("doctor", model, "--adapter", adapter, "--device", "cpu")
    assert asked.exit_code == 0, asked.output
    assert "Loss: perplexity" in asked.stdout and "limit +20.00%" in asked.stdout


def test_content_routers_are_executed_by_plain_pytorch() -> None:
    told = _executor(SurgeryConfig(topology="gumbel"), 64, torch.device("cpu"), torch.float32)
    assert set(told) == {"Prefill", "Decode"} and all("plain PyTorch" in phase for phase in told.values())


def test_the_doctor_times_prompts_and_writes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    made = run(
        "operate", model, "--out", adapter, "--text", text, "--density", "0.3", "--length", "512", *SMALL
    )
    assert made.exit_code == 0, made.output
    seen = []

    def timed(*arguments: object, **_: object) -> int:
        seen.append(config_of(arguments[0]).theta)
        return 512

    monkeypatch.setattr(pays, "measured_dense_until", timed)
    given = ["--adapter", adapter, "--text", text, "--device", "cpu", "--write"]
    result = run("doctor", model, *given, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert "2 of 2 layers can be operated, 4 query and 2 KV heads of 8" in found["Model"]
    assert found["Prefill"].startswith("plain PyTorch") and found["Decode"].endswith("they gain nothing")
    assert found["dense_until"] == 512 and "below position 512" in found["advice"]
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["surgery"]
    assert saved["dense_until"] == 512 and seen == [saved["theta"]]
    shown = run(
        "evaluate", model, "--adapter", adapter, "--text", text, "--length", "256", "--windows", "1", "--json"
    )
    assert json.loads(shown.stdout)["operated"][0]["config"]["dense_until"] == 512
    monkeypatch.undo()
    monkeypatch.setattr(pays, "SHORTEST", 512)
    result = run("doctor", model, *given)
    assert result.exit_code == 0 and "is written into" in result.stdout, result.output


def test_a_model_that_cannot_be_operated_is_told_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}), encoding="utf-8")
    result = run("doctor", tmp_path)
    assert result.exit_code == 1 and "Error:" in result.stderr and "Traceback" not in result.output


def test_lengths_are_read() -> None:
    assert parse_length("2k") == 2048 and parse_length("300") == 300
    for wrong in ("k", "", "-5", "0", "0k", "1.5k"):
        with pytest.raises(SurgeryError, match="tokens"):
            parse_length(wrong)
