"""Domains by name, and documents cut in two."""

from pathlib import Path

import pytest

from llama_surgery.errors import TextError
from llama_surgery.evaluation.texts import read_domains, split_texts


def test_a_text_is_split_at_a_paragraph_after_its_first_quarter() -> None:
    paragraphs = [f"{number} " * 50 for number in range(8)]
    first, rest = split_texts(["\n\n".join(paragraphs), "one paragraph alone"])
    assert [len(part) for part in (first, rest)] == [1, 1]
    assert first[0].split("\n\n") == paragraphs[:3]
    assert [part.strip() for part in rest[0].split("\n\n")] == [part.strip() for part in paragraphs[3:]]
    with pytest.raises(TextError, match="cannot be split"):
        split_texts(["one paragraph alone"])


def test_domains_are_named_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "french").mkdir()
    (tmp_path / "french" / "a.txt").write_text("un", encoding="utf-8")
    (tmp_path / "odd=name.txt").write_text("two", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_domains(["french", "odd=name.txt", "again=french"]) == {
        "french": ["un"],
        "odd=name": ["two"],
        "again": ["un"],
    }
    with pytest.raises(TextError, match="two domains are named 'french'"):
        read_domains(["french", f"french={tmp_path / 'french'}"])
    with pytest.raises(TextError, match="no such file"):
        read_domains(["code=nowhere"])
