"""What commands write: never over what is not theirs, and said before any work is done."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from tests.cli.runner import SMALL, run
from transformers import AutoModelForCausalLM

from llama_surgery.cli import common
from llama_surgery.cli.commands import checked_output
from llama_surgery.errors import SurgeryError


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a command may spoil."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["operate", "MODEL", "--out", "MODEL"],
        ["learn", "MODEL", "--text", "TEXT", "--density", "0.2", "--out", "MODEL"],
        ["evaluate", "MODEL", "--text", "TEXT", "--out", "MODEL"],
        ["demo", "--out", "MODEL"],
        ["export", "MODEL", "MODEL"],
        ["report", "TEXT", "--out", "MODEL/adapter_config.json"],
        ["report", "TEXT", "--out", "MODEL/tokenizer.json"],
        ["export-topology", "MODEL", "--text", "TEXT", "--out", "MODEL/model.safetensors"],
        ["export-topology", "MODEL", "--text", "TEXT", "--out", "MODEL/generation_config.json"],
        ["report", "TEXT", "--out", "MODEL/config.json"],
    ],
    ids=lambda arguments: " ".join(arguments[-3:]),
)
def test_nothing_of_a_model_is_written_over(
    arguments: list[str], copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("refused only after the model was loaded")

    for module in ("operate", "learn", "evaluate", "export", "demo"):
        monkeypatch.setattr(sys.modules[f"llama_surgery.cli.{module}"], "load_model", load)
    before = contents(copy)
    given = [argument.replace("MODEL", str(copy)).replace("TEXT", str(text)) for argument in arguments]
    result = run(*given)
    assert result.exit_code == 1 and "Error:" in result.stderr, result.output
    assert contents(copy) == before
    AutoModelForCausalLM.from_pretrained(copy)


def test_an_adapter_within_the_folder_of_its_model(copy: Path) -> None:
    assert run("operate", copy, "--out", copy / "adapter", *SMALL).exit_code == 0
    assert run("operate", copy, "--out", copy / "adapter", *SMALL).exit_code == 0  # ours: replaced
    AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export-topology", "MODEL", "--text", "TEXT", "--out", "TEXT"],
        ["export-topology", "MODEL", "--text", "LINK", "--out", "TEXT"],
        ["report", "TEXT", "--out", "LINK"],
    ],
)
def test_what_is_read_is_not_written_over(arguments: list[str], model: Path, tmp_path: Path) -> None:
    names = {name: tmp_path / name.lower() for name in ("TEXT", "LINK")}
    names["TEXT"].write_text("precious")
    names["LINK"].symlink_to(names["TEXT"])
    names |= {"MODEL": model}
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1 and "is named twice" in result.stderr, result.output
    assert names["TEXT"].read_text() == "precious"


def test_places_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, folder, told in (
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "deep", True, "Not a directory|is a file"),
        (tmp_path / "file" / "x.json", False, "Not a directory|is a file"),
        (tmp_path, False, "is a folder"),
        (Path("/dev/null"), False, "a device or a pipe"),
    ):
        with pytest.raises(SurgeryError, match=told):
            checked_output(path, folder=folder)
    assert checked_output(tmp_path / "new" / "deep", folder=True) == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()  # nothing is made before there is something to write
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SurgeryError, match="may not be written to"):
        checked_output(tmp_path / "new", folder=True)


def test_a_model_that_an_earlier_release_put_an_adapter_into_is_explained(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("operate", copy, "--out", tmp_path / "adapter", *SMALL).exit_code == 0
    result = run("generate", tmp_path / "adapter", "--prompt", "a")
    assert result.exit_code == 1 and "is an adapter, not a model" in result.stderr
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, copy)
    for command in (["generate", copy, "--prompt", "a"], ["export", copy, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code == 1 and "to a folder of their own" in result.stderr, result.output
    monkeypatch.setattr("llama_surgery.checkpoint.find_spec", lambda name: None)  # no PEFT: it loads
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    loaded, _ = common.load_model(str(copy), "cpu", common.Dtype.float32)
    assert loaded.config.num_hidden_layers == 2
