"""Documents cut in two."""

import pytest

from llama_surgery.errors import TextError
from llama_surgery.text import split_texts


def test_a_text_is_split_at_a_paragraph_after_its_first_quarter() -> None:
    paragraphs = [f"{number} " * 50 for number in range(8)]
    first, rest = split_texts(["\n\n".join(paragraphs), "one paragraph alone"])
    assert [len(part) for part in (first, rest)] == [1, 1]
    assert first[0].split("\n\n") == paragraphs[:3]
    assert [part.strip() for part in rest[0].split("\n\n")] == [part.strip() for part in paragraphs[3:]]
    with pytest.raises(TextError, match="cannot be split"):
        split_texts(["one paragraph alone"])
