"""Progress on a terminal and elsewhere."""

import re

import pytest
from rich.console import Console

from llama_surgery.cli import console
from llama_surgery.cli.tables import make_table


def test_progress_elsewhere_than_on_a_terminal_is_lines_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=False))
    with console.progress() as tell:
        for stage, seconds in (("thresholds [of all]", 1.0), ("needles", 4.0)):
            for done in range(13):
                tell(stage, done, 12)
                now += seconds
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "thresholds [of all]: 0/12, 0 s",
        "thresholds [of all]: 10/12, 10 s",
        "needles: 0/12, 0 s",
    ]
    assert lines[3:] == [f"needles: {n}/12, {4 * n} s" for n in (3, 6, 9, 12)]


def test_a_table_is_whole_in_80_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["tokens", "share of all (query, key) pairs", "attention of one layer", "keys and values"]
    row = ["131,072", "0.0046", "16.5", "1.07 GB"]
    for width, broken in ((60, True), (120, False)):
        monkeypatch.setattr(console.out, "width", width)
        with console.out.capture() as capture:
            console.out.print(make_table("A table", columns, [row, []]))
        shown = capture.get()
        assert all(figure in shown for figure in row) and "…" not in shown
        assert ("keys and values" not in shown) is broken


def test_progress_on_a_terminal_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, width=100))
    with console.progress() as tell:
        tell("needles", 3, 12)
    assert re.search(r"needles.*3/12", capsys.readouterr().err)
