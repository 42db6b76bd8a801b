"""Lengths of texts as people write them."""

from llama_surgery.errors import SurgeryError

#: Far beyond every model; what is counted in chunks would take minutes for more.
LONGEST = 2**27


def parse_length(text: str) -> int:
    """The number of tokens that ``8192`` or ``8k`` (1,024 tokens each) stands for.

    Raises:
        SurgeryError: It is no such number, zero, or more than ``LONGEST``.
    """
    number, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    whole = number.isascii() and number.isdigit() and len(number) <= len(str(LONGEST))
    if not whole or not 0 < int(number) * factor <= LONGEST:
        raise SurgeryError(
            f"length {text!r}: give a number of tokens, such as 8192 or 8k, of at most {LONGEST // 1024}k."
        )
    return int(number) * factor
