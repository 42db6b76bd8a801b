"""``llama-surgery learn`` from a folder of text to an adapter that evaluates and generates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from llama_surgery import eject, load_adapter
from llama_surgery.cli import app
from llama_surgery.surgery.operate import routers_of

SMALL = ["--chunk-size", "64", "--page-size", "16", "--window", "32", "--tile", "16", "--length", "256"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    whole = (demo_model_path.parent / "text" / "calibration.txt").read_text(encoding="utf-8")
    path.write_text(whole[:12_000], encoding="utf-8")
    return path


def test_learn_writes_an_adapter_that_runs(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["learn", model, "--text", text, "--density", "0.2", "--out", tmp_path / "adapter", *SMALL]
    command += ["--steps", "3", "--local-steps", "2", "--windows", "3", "--json", "--part", "channels"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["last_step"]["step"] == 3 and 0 < told["last_step"]["density"] < 1
    assert {"checkpoint-local.pt", "checkpoint-logits.pt", "adapter_config.json"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert sorted(routers_of(loaded)) == [0, 1] and "variance_weight" in routers_of(loaded)[0].tensors()
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


def test_wrong_settings_end_in_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    base = ["learn", model, "--text", text, "--out", tmp_path / "adapter", *SMALL]
    for arguments, told in (
        (["--density", "2"], "density=2.0"),
        (["--density", "0.2", "--part", "magic"], "magic"),
        (["--density", "0.2", "--windows", "1", "--text", tmp_path / "none"], "no such file"),
    ):
        result = run(*base, *arguments)
        assert result.exit_code == 1 and told in result.stderr, result.output
