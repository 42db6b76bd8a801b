"""Files of lines that several processes add to."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmarks.json_lines import append_line, read_lines

from llama_surgery.errors import SurgeryError


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    assert read_lines(file) == []
    values = [{"a": 1.5, "é": ["\n", "\u2028"]}, 2, None]
    for value in values:
        append_line(file, value)
    assert read_lines(file) == values


def test_a_line_that_was_cut_short_costs_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_line(file, {"item": 1})
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut])
        append_line(file, {"item": 2})
        assert read_lines(file) in ([{"item": 1}, {"item": 2}], [{"item": 1}, {"item": 1}, {"item": 2}])


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"

    def write(writer: int) -> None:
        for number in range(50):
            append_line(file, [writer, number, "x" * 5000])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = [(writer, number) for writer, number, _ in read_lines(file)]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(50)]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=str(tmp_path)):
        append_line(tmp_path, 1)
