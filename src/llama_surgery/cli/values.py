"""What options take as values: shares, numbers of tokens, lists."""

from collections.abc import Sequence

import typer

from llama_surgery.errors import SurgeryError
from llama_surgery.text import parse_length


def _share(given: object) -> float:
    """The share that ``6%`` or ``0.06`` stands for.

    Raises:
        BadParameter: It is no number, or not one between 0 and 1.
    """
    text = str(given)
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 < found < 1:
        raise typer.BadParameter(f"{text!r}: give a share above 0 and below 1, such as 1% or 0.01.")
    return found


def _tokens(given: object) -> int:
    try:
        return parse_length(str(given))
    except SurgeryError as error:
        raise typer.BadParameter(str(error)) from error


#: What an option that takes a share is declared with, and one that takes a number of tokens, as 8192 or 8k.
SHARE = {"parser": _share, "metavar": "SHARE"}
TOKENS = {"parser": _tokens, "metavar": "TOKENS"}
#: What PyTorch and random take.
SEED = {"min": 0, "max": 2**63 - 1}


def split_values(given: Sequence[str]) -> list[str]:
    """Values of an option that may be repeated and may hold several after commas, each once."""
    parts = [part.strip() for item in given for part in item.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def token_counts(given: Sequence[str]) -> list[int]:
    """Numbers of tokens such as ``8192`` or ``8k`` (1,024 tokens each), ascending.

    Raises:
        SurgeryError: One is no such number.
    """
    counts = sorted({parse_length(part) for part in split_values(given)})
    if not counts:
        raise SurgeryError("no length: give a number of tokens, such as 8192 or 8k.")
    return counts
