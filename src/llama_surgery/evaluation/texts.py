"""Text that is set aside to set thresholds on."""

from collections.abc import Sequence

from llama_surgery.errors import TextError

#: Share of a text that thresholds are set on, where no other text is given for it.
CALIBRATION_SHARE = 0.25


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Text to set thresholds on, and text to measure on, which have nothing in common.

    Every document is cut at the paragraph after its first quarter.

    Raises:
        TextError: No document has a paragraph there.
    """
    first, rest = [], []
    for text in texts:
        cut = text.find("\n\n", int(CALIBRATION_SHARE * len(text)))
        if cut >= 0:
            first.append(text[:cut])
            rest.append(text[cut:].strip())
    if not any(first) or not any(rest):
        raise TextError(
            "the text cannot be split: no empty line stands after the first quarter of a document. Give two "
            "texts, one of them for calibration."
        )
    return [text for text in first if text], [text for text in rest if text]
