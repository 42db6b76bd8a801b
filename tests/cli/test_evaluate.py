"""``llama-surgery evaluate``: what it measures besides perplexity and plain needles."""

import json
from pathlib import Path

import pytest
from tests.cli.runner import SMALL, run


@pytest.fixture(scope="module")
def given(model: Path, text: Path) -> list[str | Path]:
    return ["evaluate", model, "--text", text, "--length", "512", "--windows", "1", *SMALL]


def test_everything_at_once_is_in_the_tables_and_in_the_file(
    given: list[str | Path], text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    harder = ["--needles", "4", "--needle-variant", "two-asked", "--needle-variant", "alike-names"]
    more = ["--domain", f"prose={text}", "--continuations", "2", "--continuation-tokens", "8"]
    result = run(*given, *harder, *more, "--out", path)
    assert result.exit_code == 0, result.output
    for told in ("Needles by variant", "alike-names", "By domain", "prose", "Agreement along the dense text"):
        assert told in result.stdout
    read = json.loads(path.read_text(encoding="utf-8"))
    assert {needle["variant"] for needle in read["needles"]} == {"two-asked", "alike-names"}
    rows = read["needle_comparison"]
    assert [row["variant"] for row in rows if len({"kind", "length"} & row.keys()) == 0] == [
        "two-asked",
        "alike-names",
    ]
    assert set(rows[0]["operated"]["T = 16"]) == {
        "accuracy",
        "compared",
        "difference",
        "low",
        "high",
        "lost",
        "won",
    }
    prose = read["domains"]["prose"]
    assert prose["dense"]["perplexity"] == read["dense"]["perplexity"]
    assert prose["operated"][0]["divergence_by_position"][-1]["to"] == 512
    written = read["continuations"]["T = 16"]
    assert written["prompt_tokens"] == 504 and written["compared"] <= 16


def test_all_variants_can_be_asked_for(given: list[str | Path]) -> None:
    result = run(*given, "--needles", "5", "--needle-variant", "all", "--needle-length", "768", "--json")
    assert result.exit_code == 0, result.output
    variants = [needle["variant"] for needle in json.loads(result.stdout)["needles"]]
    assert len(set(variants)) == 5


def test_wrong_extras_are_refused(given: list[str | Path], tmp_path: Path) -> None:
    assert run(*given, "--needle-variant", "all").exit_code == 2
    unknown = run(*given, "--needles", "1", "--needle-variant", "fifty")
    assert unknown.exit_code == 1 and "sixteen-facts" in unknown.stderr
    missing = run(*given, "--domain", f"code={tmp_path / 'nowhere'}")
    assert missing.exit_code == 1 and "no such file" in missing.stderr
    long = run(*given, "--continuations", "1", "--continuation-tokens", "512")
    assert long.exit_code == 1 and "512 new tokens of 512" in long.stderr
