"""``llama-surgery verify``."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import run


@pytest.fixture(scope="module")
def given(model: Path, demo_model_path: Path) -> list[str | Path]:
    text = demo_model_path.parent / "text" / "calibration.txt"
    few = ["--samples", "1", "--windows", "2", "--task", "vt,fwe"]
    return ["verify", model, "--text", text, "--length", "768,8k", "--density", "0.3", *few]


def test_one_command_calibrates_compares_and_tells(given: list[str | Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run(*given, "--out", folder)
    assert result.exit_code == 0, result.output
    for told in (
        "what the operated model loses",
        "2 windows, too few",
        "What the operated model reads",
        f"8,192 tokens: {given[1].name} was made for 1,024",
        "Open: ",
    ):
        assert told in result.stdout
    assert (folder / "adapter" / "adapter_config.json").is_file()
    report = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "open" and report["limits"]["single"] == 0.1
    again = run(*given, "--out", folder, "--json", "--max-perplexity", "0.5")
    assert json.loads(again.stdout)["limits"]["perplexity"] == 0.5
    assert json.loads(again.stdout)["text"] == report["text"]  # measured once
    other = run(*given, "--out", folder, "--density", "0.4")
    assert other.exit_code == 1 and "density: 0.3 there, 0.4 now" in other.stderr


def test_what_does_not_fit_together_is_refused(given: list[str | Path], text: Path, tmp_path: Path) -> None:
    both = run(*given, "--out", tmp_path, "--adapter", tmp_path, "--calibration-text", text)
    assert both.exit_code == 2
    short = run(*given, "--out", tmp_path, "--calibration-text", text.parent / "nowhere")
    assert short.exit_code == 1 and "no such file" in short.stderr
