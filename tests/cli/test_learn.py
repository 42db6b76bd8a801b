"""``llama-surgery learn`` from a folder of text to an adapter that evaluates and generates."""

import json
import os
from pathlib import Path

import pytest
from tests.cli.runner import SMALL as SHORT
from tests.cli.runner import run
from transformers import AutoModelForCausalLM

from llama_surgery import eject, load_adapter
from llama_surgery.learning.processes import Processes
from llama_surgery.surgery.operation import routers_of

SMALL = [*SHORT, "--length", "256"]


def test_learn_writes_an_adapter_that_runs(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["learn", model, "--text", text, "--density", "0.2", "--out", tmp_path / "adapter", *SMALL]
    command += ["--steps", "3", "--windows", "3", "--json"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["last_step"]["step"] == 3 and 0 < told["last_step"]["density"] < 1
    assert {"checkpoint-logits.pt", "adapter_config.json"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert sorted(routers_of(loaded)) == [0, 1] and told["config"]["summary"] == "page"
    assert {"variance_weight", "summary"} < routers_of(loaded)[0].tensors().keys()
    eject(loaded)

    again = run(*command)  # nothing is left to do: the checkpoints are those of the end
    assert again.exit_code == 0 and json.loads(again.stdout)["config"] == told["config"]

    evaluated = run(
        "evaluate",
        model,
        "--text",
        text,
        "--adapter",
        tmp_path / "adapter",
        "--length",
        "256",
        "--windows",
        "1",
    )
    assert evaluated.exit_code == 0, evaluated.output


@pytest.mark.parametrize("alone", [["--stream"], ["--device", "split"]])
def test_what_only_one_process_does(
    alone: list[str], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_surgery.learning.processes.launched", lambda device: Processes(1, 2))
    out = tmp_path / "adapter"
    result = run("learn", model, "--text", text, "--density", "0.2", "--out", out, *SMALL, *alone)
    assert result.exit_code == 1 and "2 processes" in result.output


def test_processes_do_not_share_a_pipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("llama_surgery.learning.processes.launched", lambda device: Processes(1, 2))
    given = ["--text", tmp_path / "pipe", "--density", "0.2", "--out", tmp_path / "adapter"]
    result = run("learn", model, *given, *SMALL)
    assert result.exit_code == 1 and "which only one process can read" in result.stderr


def test_learn_with_the_model_on_disk(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["learn", model, "--text", text, "--density", "0.2", "--out", tmp_path / "adapter", *SMALL]
    command += ["--steps", "3", "--windows", "2", "--stream", "--json", "--device", "cpu"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["last_step"]["step"] == 3 and 0 < told["config"]["theta"] < 1
    states = tmp_path / "adapter" / "states"
    assert len(list(states.glob("*.safetensors"))) == 2 * 2  # windows × layers
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert sorted(routers_of(loaded)) == [0, 1]

    again = run(*command)
    assert again.exit_code == 0 and json.loads(again.stdout)["config"] == told["config"]


def test_wrong_settings_end_in_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    base = ["learn", model, "--text", text, "--out", tmp_path / "adapter", *SMALL]
    for arguments, told in (
        (["--density", "0.2", "--part", "magic"], "magic"),
        (
            ["--density", "0.2", "--part", "summary", "--summary", "none", "--windows", "2"],
            "no summary to weigh",
        ),
        (["--density", "0.2", "--windows", "1", "--text", tmp_path / "none"], "no such file"),
    ):
        result = run(*base, *arguments)
        assert result.exit_code == 1 and told in result.stderr, result.output
