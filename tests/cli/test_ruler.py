"""``llama-surgery ruler``."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import SMALL, run

SQUAD = Path(__file__).resolve().parents[1] / "fixtures" / "ruler" / "squad.json"


@pytest.fixture(scope="module")
def given(model: Path) -> list[str | Path]:
    return ["ruler", model, "--length", "640,1k", "--samples", "2", "--task", "vt,fwe", "--batch", "2"]


def test_tables_and_files_of_an_adapter_with_everything_open(
    given: list[str | Path], model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "full"
    made = run("operate", model, "--out", adapter, *SMALL, "--theta", "0", "--theta-decode", "0")
    assert made.exit_code == 0, made.output
    path, table = tmp_path / "ruler.json", tmp_path / "ruler.csv"
    result = run(*given, "--adapter", adapter, "--out", path, "--csv", table)
    assert result.exit_code == 0, result.output
    for told in (
        "RULER at 640 tokens",
        "RULER at 1,024 tokens",
        "RULER at all lengths",
        "worst task",
        "100.0%",
    ):
        assert told in result.stdout
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["complete"] and read["settings"]["lengths"] == [640, 1024]
    answers = {(c["name"], c["task"], c["length"]): c["answers"] for c in read["cells"]}
    for task, length in (("vt", 640), ("fwe", 640), ("vt", 1024), ("fwe", 1024)):
        assert answers["T = 16", task, length] == answers["dense", task, length]
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + 2 * 2 * 2
    before = path.stat().st_mtime_ns
    again = run(*given, "--adapter", adapter, "--out", path, "--json")
    assert json.loads(again.stdout) == read and path.stat().st_mtime_ns == before
    other = run(*given, "--adapter", adapter, "--out", path, "--seed", "1")
    assert other.exit_code == 1 and "seed: 0 there, 1 now" in other.stderr


def test_own_haystack_and_questions(model: Path, text: Path) -> None:
    files = ["--haystack", text, "--qa-1", SQUAD]
    result = run(
        "ruler", model, "--length", "1k", "--samples", "1", "--task", "niah_single_2,qa_1", *files, "--json"
    )
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert settings["questions"].keys() == {"qa_1"} and settings["tasks"] == ["niah_single_2", "qa_1"]


def test_reading_tasks_are_left_out_without_files(model: Path) -> None:
    # All other tasks are meant, and the common words need more room than this.
    result = run("ruler", model, "--length", "700")
    assert result.exit_code == 1 and "cwe does not fit into 700 tokens" in result.stderr
    assert "Left out: qa_1, qa_2" in result.stderr


def test_what_is_wrong_is_said(model: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (["--task", "vtt"], "task 'vtt'"),
        (["--length", "8q"], "length '8q'"),
        (["--length", "8k"], "was made for 1024"),
        (["--qa-1", tmp_path / "nowhere.json"], "cannot be read"),
        (["--task", "qa_2"], "qa_2 needs a question file"),
        (["--chat"], "no chat template"),
    ):
        result = run("ruler", model, "--task", "vt", "--length", "1k", *arguments)
        assert result.exit_code == 1 and told in result.stderr, result.output
