"""Plain text in, token windows out."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError


def read_texts(path: str | Path) -> list[str]:
    """Reads one text file, or every ``.txt`` file of a folder.

    Args:
        path: A file, or a folder whose ``.txt`` files are read in the order of their names.

    Returns:
        One string a document, none of them blank.

    Raises:
        TextError: Nothing is there, a folder holds no ``.txt`` file, or a file is blank,
            unreadable or not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise TextError(f"{path}: no .txt file in this folder. Give plain text, one document a file.")
    elif path.is_file():
        files = [path]
    else:
        raise TextError(f"{path}: no such file or folder. Give a text file or a folder of .txt files.")
    return [_read(file) for file in files]


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{file}: not UTF-8 (byte {error.start}: {error.reason}). Convert it to UTF-8 first."
        ) from error
    except OSError as error:
        raise TextError(f"{file}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise TextError(f"{file}: the file is empty. Remove it or give it text.")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` alone: no special tokens, and no warning that it is long."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text (``<bos>`` for some models, nothing for others).

    Models that were trained with a first token of their own collapse without it.
    """
    bare = encode(tokenizer, "a")
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, count: int, seed: int
) -> torch.Tensor:
    """Cuts token windows that do not overlap and never cross from one document into another.

    Documents are taken in turn, so that a few windows already come from different ones. Each window
    begins with the tokens that the tokenizer puts before a text, if it puts any.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents.
        length: Tokens of a window.
        count: Windows wanted.
        seed: The same seed gives the same windows.

    Returns:
        Token ids, int64, (count, length).

    Raises:
        TextError: ``length`` or ``count`` is too small, or the documents hold fewer whole windows.
    """
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
    if len(chosen) < count:
        raise TextError(
            f"{count} windows of {length} tokens were asked for; {len(texts)} documents with {found} "
            f"tokens hold {len(chosen)} whole ones, and {count * body} tokens in whole windows are "
            "needed. Give more or longer text, or ask for fewer or shorter windows."
        )
    return torch.tensor(chosen[:count], dtype=torch.long)
