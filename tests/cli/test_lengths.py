"""Lengths beyond a model's context are remarked on; defaults that a text does not meet take what is there."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.runner import SMALL, run
from tests.surgery.tiny import build
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.context import check_length, usual_length

#: The tiny checkpoint has a context of 1,024 tokens.
BEYOND = "the model was made for 1,024 positions at most"


def notes(result: Any) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if "Note:" in line]


@pytest.fixture
def short(text: Path, tmp_path: Path) -> Path:
    """A text of two windows of 256 tokens, in paragraphs."""
    path = tmp_path / "short.txt"
    path.write_text(text.read_text(encoding="utf-8")[:2200], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "MODEL", "--text", "TEXT", "--length", "1040", "--windows", "1"],
        ["evaluate", "MODEL", "--text", "TEXT", "--length", "64", "--windows", "1", "--needles", "1",
         "--needle-length", "1040"],
        ["operate", "MODEL", "--text", "TEXT", "--density", "0.3", "--length", "1040", "--out", "OUT"],
        ["learn", "MODEL", "--text", "TEXT", "--density", "0.3", "--length", "1040", "--out", "OUT",
         "--steps", "1", "--windows", "1"],
        ["learn", "MODEL", "--text", "TEXT", "--density", "0.3", "--length", "1040", "--out", "OUT",
         "--steps", "1", "--windows", "1", "--stream", "--device", "cpu"],
        ["plan", "MODEL", "--length", "512,1040"],
        ["generate", "MODEL", "--prompt", "Once upon a time", "--max-new-tokens", "1030"],
        ["export-topology", "MODEL", "--text", "TEXT", "--length", "1040", "--out", "OUT"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)  # fmt: skip
def test_a_length_beyond_the_context_is_remarked_on_once(
    arguments: list[str], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments[0] == "generate":  # the remark comes first: a thousand steps need not follow
        monkeypatch.setattr(
            "transformers.GenerationMixin.generate", lambda *_, input_ids, **__: torch.cat([input_ids] * 2, 1)
        )
    paths = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out"}
    topology = SMALL if arguments[0] not in ("generate", "export-topology") else []
    told = [n for n in notes(run(*(paths.get(a, a) for a in arguments), *topology)) if BEYOND in n]
    assert len(told) == 1


def test_the_length_of_windows_is_not_remarked_on_where_none_are_read(model: Path) -> None:
    asked = ["--ruler", "--ruler-task", "niah_single_1", "--ruler-length", "512", "--ruler-samples", "1"]
    assert not notes(run("evaluate", model, *asked, *SMALL))


def test_models_whose_positions_are_a_table_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    config = GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=97, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    table = GPT2LMHeadModel(config)
    check_length(table, 128)
    with pytest.raises(SurgeryError, match=r"129 tokens: the model was made for 128 .*knows no others"):
        check_length(table, 129)
    check_length(table, 129, read=False)
    assert "128 positions" in caplog.text


def test_what_a_configuration_says_of_its_context(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    llama = build("Llama", max_position_embeddings=512)
    check_length(llama, 512)
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    check_length(build("Llama", max_position_embeddings=512, rope_parameters=stretched), 2048)
    assert not caplog.records and usual_length(llama) == 512
    vars(llama.config)["max_position_embeddings"] = None
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    for model in (llama, bloom):  # neither says how far it reads
        check_length(model, 10**9)
        assert usual_length(model) == 8192
    assert not caplog.records


def test_commands_take_the_windows_that_a_short_text_holds(model: Path, short: Path, tmp_path: Path) -> None:
    length = ["--length", "256", *SMALL]
    for command, usual in (
        (["evaluate", model, "--text", short], 16),
        (["operate", model, "--text", short, "--density", "0.3", "--out", tmp_path / "a"], 4),
        (["learn", model, "--text", short, "--density", "0.3", "--steps", "1", "--out", tmp_path / "b"], 200),
    ):
        told = [n for n in notes(run(*command, *length)) if f"usual {usual}: these are taken" in n]
        assert len(told) == 1 and all("holds 2 windows of 256 tokens" in n for n in told)
    stream = ["--stream", "--steps", "1", "--device", "cpu", "--out", tmp_path / "c"]
    told = notes(run("learn", model, "--text", short, "--density", "0.3", *stream, *length))
    assert len(told) == 1 and "the usual 16" in told[0]


def test_windows_that_are_asked_for_are_not_fewer(model: Path, short: Path, tmp_path: Path) -> None:
    given = ["--text", short, "--length", "256", *SMALL]
    for command in (
        ["evaluate", model, "--windows", "3"],
        ["learn", model, "--density", "0.3", "--windows", "3", "--out", tmp_path / "a"],
        ["evaluate", model, "--calibration-text", short, "--windows", "3", "--against", "dense"],
    ):  # fmt: skip
        result = run(*command, *given)
        assert result.exit_code == 1 and "3 windows of 256 tokens were asked for" in result.stderr


def test_the_windows_that_there_were_are_recorded(model: Path, short: Path) -> None:
    given = ["evaluate", model, "--text", short, "--length", "256", *SMALL, "--json"]
    measured = run(*given)
    assert json.loads(measured.stdout)["windows"] == 2, measured.output
    few = ["--needles", "1", "--needle-length", "128", "--needle-variant", "one-fact"]
    compared = run(*given, "--calibration-text", short, "--against", "dense", *few)
    assert json.loads(compared.stdout)["against"]["settings"]["windows"] == 2, compared.output
    assert "the usual 24" in compared.stderr


def test_thresholds_are_set_on_shorter_windows_where_no_document_is_as_long(
    model: Path, short: Path, tmp_path: Path
) -> None:
    """No length is asked for, and the usual one, the model's context, is longer than the text."""
    given = ["--text", short, "--density", "0.3", *SMALL]
    told = notes(run("operate", model, *given, "--out", tmp_path / "a"))
    assert any("no document holds 1,024 tokens: thresholds are set on windows of 512" in n for n in told)
    asked = run("operate", model, *given, "--out", tmp_path / "b", "--length", "1024")
    assert asked.exit_code == 1 and "windows of 1024 tokens" in asked.stderr
    short.write_text("too little", encoding="utf-8")
    nothing = run("operate", model, *given, "--out", tmp_path / "b")
    assert nothing.exit_code == 1 and "1024 tokens" in nothing.stderr
