"""Documents cut in two."""

import pytest

from llama_surgery.errors import TextError
from llama_surgery.text import split_texts


def test_a_text_is_split_at_a_paragraph_after_its_first_quarter(caplog: pytest.LogCaptureFixture) -> None:
    paragraphs = [f"{number} " * 50 for number in range(8)]
    first, rest = split_texts(["\n\n".join(paragraphs), "one line alone", "word"])
    assert [len(part) for part in (first, rest)] == [3, 2]
    assert first[0].split("\n\n") == paragraphs[:3]
    assert (first[1:], rest[1]) == (["one", "word"], "line alone")
    assert "1 of 3 documents cannot be split" in caplog.text
    assert [part.strip() for part in rest[0].split("\n\n")] == [part.strip() for part in paragraphs[3:]]
    with pytest.raises(TextError, match="cannot be split"):
        split_texts(["word", ""])
