"""Checkpoints and adapters that are damaged or of something else end in one line, in every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.runner import SMALL, run

PARTS = ("config.json", "model.safetensors", "tokenizer.json")


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "configuration cut off": lambda folder: (folder / "config.json").write_text("{"),
    "configuration of something else": lambda folder: (folder / "config.json").write_text("[1]"),
    "unknown architecture": lambda folder: rewrite(folder, model_type="no-such-model"),
    "a word for a number": lambda folder: rewrite(folder, hidden_size="wide"),
    "no heads": lambda folder: rewrite(folder, num_attention_heads=0),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0"),
    "other shapes": lambda folder: rewrite(folder, hidden_size=64),
    "tokenizer cut off": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no tokenizer": no_tokenizer,
}
#: What a command does not read, it does not miss.
READS = {
    "generate": DAMAGES.keys(),
    "learn": DAMAGES.keys(),
    "export": DAMAGES.keys() - {"tokenizer cut off", "no tokenizer"},
    "plan": {
        name for name in DAMAGES if "conf" in name or "heads" in name or "arch" in name or "word" in name
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_line(damage: str, model: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    DAMAGES[damage](folder)
    learn = ["--text", text, "--density", "0.3", "--stage", "local", "--stream", "--steps", "1"]
    learn += ["--windows", "1", "--length", "128", "--device", "cpu", "--out", tmp_path / "a", *SMALL]
    for command, *options in (
        ["generate", folder, "--prompt", "a", "--max-new-tokens", "1"],
        ["learn", folder, *learn],
        ["export", folder, tmp_path / "served"],
        ["plan", folder],
    ):
        if damage not in READS[command]:
            continue
        result = run(command, *options)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1, (command, result.output)
        assert "Error:" in result.stderr.strip().splitlines()[-1], (command, result.stderr)
