"""Every command and line of docs/tutorial.md, on a tiny model and short texts in the places of the demo's."""

import re
import shlex
from pathlib import Path

import pytest
from tests.cli.runner import run

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_tutorial_runs_as_it_stands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo" / "text").mkdir(parents=True)
    (tmp_path / "demo" / "books-26m").symlink_to(model)
    for name in ("calibration", "evaluation"):
        whole = (ROOT / "demo" / "text" / f"{name}.txt").read_text(encoding="utf-8")
        (tmp_path / "demo" / "text" / f"{name}.txt").write_text(whole[:20_000], encoding="utf-8")
    (tmp_path / "demo" / "text" / "prompt.txt").write_text(whole[:4_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "llama-surgery"
        result = run(*arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        if arguments[0] == "generate":
            for code in blocks("python"):
                exec(compile(code, "tutorial.md", "exec"), {})
