"""Lengths of texts as people write them."""

from llama_surgery.errors import SurgeryError


def parse_length(text: str) -> int:
    """The number of tokens that ``8192`` or ``8k`` (1,024 tokens each) stands for.

    Raises:
        SurgeryError: It is no such number, or zero.
    """
    number, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isascii() or not number.isdigit() or not int(number):
        raise SurgeryError(f"length {text!r}: give a number of tokens, such as 8192 or 8k.")
    return int(number) * factor
