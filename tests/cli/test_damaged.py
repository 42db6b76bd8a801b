"""Checkpoints and adapters that are damaged or of something else end in one line, in every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.runner import SMALL, run

PARTS = ("config.json", "model.safetensors", "tokenizer.json")


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Write the weights anew, without those that are changed to None."""
    file = folder / "model.safetensors"
    new = {name: change(name, value) for name, value in load_file(file).items()}
    save_file({name: value for name, value in new.items() if value is not None}, file, {"format": "pt"})


def fewer_tokens(folder: Path) -> None:
    rewrite(folder, vocab_size=32)
    changed(folder, lambda name, value: value[:32] if "embed" in name or "lm_head" in name else value)


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
    "tokenizer of a larger model": fewer_tokens,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "weights missing": lambda folder: changed(folder, lambda name, value: None if "1.mlp" in name else value),
    "weights that are NaN": lambda folder: changed(
        folder, lambda name, value: value * float("nan") if "proj" in name else value
    ),
}
#: What a command does not read, it does not miss.
READS = {
    "generate": DAMAGES.keys(),
    "learn": DAMAGES.keys(),
    "operate": DAMAGES.keys(),
    "export": {name for name in DAMAGES if "tokenizer" not in name and "weights " not in name}
    | {"weights cut off"},
    "plan": {
        name for name in DAMAGES if "conf" in name or "heads" in name or "arch" in name or "word" in name
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_line(damage: str, model: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    DAMAGES[damage](folder)
    given = ["--text", text, "--density", "0.3", "--length", "256", *SMALL]
    learn = ["--text", text, "--density", "0.3", "--stream", "--steps", "1"]
    learn += ["--windows", "1", "--length", "128", "--device", "cpu", "--out", tmp_path / "a", *SMALL]
    for command, *options in (
        ["generate", folder, "--prompt", "a", "--max-new-tokens", "1"],
        ["learn", folder, *learn],
        ["operate", folder, "--out", tmp_path / "b", *given],
        ["export", folder, tmp_path / "served"],
        ["plan", folder],
    ):
        if damage not in READS[command]:
            continue
        result = run(command, *options)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1, (command, result.output)
        assert "Error:" in result.stderr.strip().splitlines()[-1], (command, result.stderr)


ADAPTERS: dict[str, tuple[str, bytes]] = {
    "description cut off": ("adapter_config.json", b'{"peft_type"'),
    "description of something else": ("adapter_config.json", b'[{"peft_type": "LORA"}]'),
    "adapter of another library": ("adapter_config.json", b'{"peft_type": "LORA", "surgery": {}}'),
    "topology of no known kind": (
        "adapter_config.json",
        b'{"peft_type": "llama-surgery", "format_version": 2, "base_model": {}, "surgery": [1]}',
    ),
    "tensors cut off": ("adapter_model.safetensors", b"\x10\0"),
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_a_damaged_adapter_ends_in_one_line(damage: str, model: Path, text: Path, tmp_path: Path) -> None:
    adapter, (name, content) = tmp_path / "adapter", ADAPTERS[damage]
    assert run("operate", model, "--out", adapter, *SMALL).exit_code == 0
    (adapter / name).write_bytes(content)
    for command, *options in (
        ["generate", model, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", "1"],
        ["evaluate", model, "--adapter", adapter, "--text", text, "--length", "256", "--windows", "1"],
        ["doctor", model, "--adapter", adapter, "--device", "cpu", "--text", text, "--write"],
        ["export", model, adapter, tmp_path / "served"],
    ):
        result = run(command, *options)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1, (command, result.output)
        last = result.stderr.strip().splitlines()[-1]
        assert "Error:" in last and str(adapter) in last, (command, result.stderr)
    assert (adapter / name).read_bytes() == content


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", "--prompt", "a", "--seed", "9" * 30],
        ["generate", "MODEL", "--prompt", "a", "--seed", "-1"],
        ["plan", "MODEL", "--length", "999999999999k"],
        ["plan", "MODEL", "--length", "9" * 5000],
        ["evaluate", "MODEL", "--text", "TEXT", "--total-density", "0.5"],
        ["evaluate", "MODEL", "--text", "TEXT", "--ruler-task", "vt"],
        ["evaluate", "MODEL", "--text", "TEXT", "--lm-eval-limit", "3"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:])[:40],
)
def test_silly_values_are_refused(arguments: list[str], model: Path, text: Path) -> None:
    result = run(*({"MODEL": model, "TEXT": text}.get(argument, argument) for argument in arguments))
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), result.output
    assert "Error" in result.stderr and "Loading" not in result.stderr
