"""Plain text in, token windows out."""

import codecs
import itertools
import logging
import random
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_surgery.errors import SurgeryError, TextError

if TYPE_CHECKING:  # texts are read, and refused, before PyTorch is loaded
    import torch
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
#: Share of a text that thresholds are set on, where no other text is given for it.
CALIBRATION_SHARE = 0.25
#: Tokens far beyond every model; what is counted in chunks would take minutes for more.
LONGEST = 2**27
#: Marks before a text, and the encodings that they stand for; longer ones first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: What files that may be taken for text begin with.
_OTHER_FILES = {
    b"\x1f\x8b": "a gzip file: unpack it, or name <(zcat FILE)",
    b"\xfd7zXZ\0": "an xz file: unpack it, or name <(xzcat FILE)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it, or name <(zstdcat FILE)",
    b"PK\x03\x04": "a zip archive, as office documents and e-books are",
    b"%PDF-": "a PDF",
}


def read_texts(path: str | Path) -> list[str]:
    """Reads one text file or pipe, or every ``.txt`` file of a folder in the order of their names.

    Returns:
        One string a document, none of them blank.

    Raises:
        TextError: Nothing is there, a folder holds no ``.txt`` file, or a file is blank, unreadable, a
            device, not text, or text in another encoding than UTF-8 (UTF-16 and UTF-32 are read where a mark
            at the beginning says so).
    """
    path = Path(path)
    if not stat.S_ISDIR(_mode(path)):
        return [read_text(path)]
    try:
        files = sorted(file for file in path.iterdir() if file.name.endswith(".txt") and not file.is_dir())
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}).") from error
    if not files:
        raise TextError(f"{path}: no .txt file in this folder. Give plain text, one document a file.")
    for file in files:
        if not stat.S_ISREG(_mode(file)):  # a pipe that nobody writes to would be waited for
            raise TextError(f"{file}: neither a file nor a folder. Take it out of the folder.")
    return [read_text(file) for file in files]


def read_text(file: str | Path) -> str:
    """Reads one text file or pipe, without the mark that some programs put before a text.

    Raises:
        TextError: As :func:`read_texts` does; a folder is refused too.
    """
    file = Path(file)
    mode = _mode(file)
    if stat.S_ISDIR(mode):
        raise TextError(f"{file} is a folder: give one text file.")
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise TextError(f"{file}: a device, not a file. Give a text file.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TextError(f"{file}: cannot be read ({error.strerror}).") from error
    text = decoded(file, content)
    if not text.strip():
        raise TextError(f"{file}: the file is empty. Remove it or give it text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse_pipes(*paths: Path) -> None:
    """Raises TextError where several processes would each get a part of a pipe, or nothing is there."""
    for path in paths:
        if stat.S_ISFIFO(_mode(path)):
            raise TextError(
                f"{path}: a pipe, which only one process can read. Write the text to a file first."
            )


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TextError(
            f"{path}: no such file or folder. Give a text file or a folder of .txt files."
        ) from error
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def decoded(file: Path, content: bytes) -> str:
    """Text of the bytes of a file, without the mark that some programs put before a text.

    Raises:
        TextError: It is not text, or in another encoding than UTF-8 and no mark says which.
    """
    if other := [kind for start, kind in _OTHER_FILES.items() if content.startswith(start)]:
        raise TextError(f"{file}: this is not text but {other[0]}. Give plain text in UTF-8.")
    codec = next((codec for mark, codec in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    binary = codec == "utf-8-sig" and b"\0" in content
    try:
        text = "" if binary else content.decode(codec)
    except UnicodeDecodeError as error:
        raise TextError(
            f"{file}: not {codec.removesuffix('-sig').upper()} (byte {error.start}: {error.reason}). Convert "
            "it to UTF-8 first."
        ) from error
    if binary or "\0" in text:
        raise TextError(
            f"{file}: this is not text, for it holds NUL bytes, as programs, images and UTF-16 without a "
            "mark do. Give plain text in UTF-8."
        )
    return text


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of ``text`` alone: no special tokens, and no warning that it is long."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def leading_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts before a text (``<bos>`` for some models, nothing for others).

    Models that were trained with a first token of their own collapse without it.
    """
    bare, whole = encode(tokenizer, "a"), tokenizer("a").input_ids
    starts = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    length: int,
    count: int | None,
    seed: int,
    *,
    usual: int = 1,
) -> "torch.Tensor":
    """Cuts token windows that do not overlap and never cross from one document into another.

    Documents are taken in turn, so that a few windows already come from different ones. Each window
    begins with the tokens that the tokenizer puts before a text, if it puts any.

    Args:
        length: Tokens of a window.
        count: Windows wanted; None for ``usual`` of them, or as many as there are, with a warning. Windows of
            a smaller count are the first of a larger one.
        seed: The same seed gives the same windows.

    Returns:
        Token ids, int64, (count, length).

    Raises:
        TextError: ``texts`` is no list of strings, ``length`` or ``count`` is too small, or the documents
            hold fewer whole windows.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise TextError(f"text is a {type(texts).__name__}: give a list of documents, such as [text].")
    if not all(isinstance(text, str) for text in texts):
        raise TextError("text is a list with something else than strings: give documents, each a string.")
    exact, count = count is not None, usual if count is None else count
    lead = leading_tokens(tokenizer)
    body = length - len(lead)
    if length < 2 or body < 1 or count < 1:
        raise TextError(
            f"{count} windows of {length} tokens: at least 1 window of at least "
            f"{max(2, len(lead) + 1)} tokens is needed."
        )
    rng = random.Random(seed)
    order = list(range(len(texts)))
    rng.shuffle(order)
    found = 0
    # Per document: its windows in random order. Documents are read in turn and only until there is
    # enough, since tokenising is the slow part.
    queues: list[list[list[int]]] = []
    for index in order:
        ids = encode(tokenizer, texts[index])
        found += len(ids)
        slots = len(ids) // body
        offset = rng.randint(0, len(ids) - slots * body)
        starts = [offset + slot * body for slot in range(slots)]
        rng.shuffle(starts)
        queues.append([lead + ids[start : start + body] for start in starts])
        if sum(map(bool, queues)) >= count:
            break
    chosen = [window for turn in itertools.zip_longest(*queues) for window in turn if window]
    if len(chosen) < count and not exact and chosen:
        _log.warning(
            f"the text holds {len(chosen)} windows of {length:,} tokens, fewer than the usual {count}: these "
            "are taken."
        )
    elif not exact and not chosen:
        raise TextError(
            f"the text is too short for windows of {length} tokens: {len(texts)} document(s) with {found:,} "
            "tokens hold no whole one. Give longer text, or ask for shorter windows."
        )
    elif len(chosen) < count:
        raise TextError(
            f"{count} windows of {length} tokens were asked for; {len(texts)} documents with {found} "
            f"tokens hold {len(chosen)} whole ones, and {count * body} tokens in whole windows are "
            "needed. Give more or longer text, or ask for fewer or shorter windows."
        )
    import torch

    return torch.tensor(chosen[:count], dtype=torch.long)


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Text to set thresholds on, and text to measure on, which have nothing in common.

    Every document is cut after its first quarter: at the next empty line or, where there is none, at the next
    line or space. What has none of these is in the first part alone, with a warning.

    Raises:
        TextError: No document can be cut.
    """
    first, rest = [], []
    for text in texts:
        cuts = (text.rstrip().find(mark, int(CALIBRATION_SHARE * len(text))) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut >= 0), len(text))
        first.append(text[:cut])
        rest.append(text[cut:].strip())
    whole = sum(not part for part in rest)
    if whole == len(texts):
        raise TextError(
            "the text cannot be split: no space stands after the first quarter of a document. Give two "
            "texts, one of them for calibration."
        )
    if whole:
        _log.warning(f"{whole} of {len(texts)} documents cannot be split: they are left to calibration.")
    return [text for text in first if text], [text for text in rest if text]


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
