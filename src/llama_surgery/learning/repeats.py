"""Windows in which passages come again: rows that must look up what was said far back."""

import random

import torch

#: Tokens of a repeated passage, at least and at most.
SHORTEST, LONGEST = 4, 64
#: One window in so many has a refrain, one passage that fills most of it: times in a row, at most.
REFRAIN, TIMES = 4, 12


def with_repeats(windows: torch.Tensor, share: float, first: int, seed: int) -> torch.Tensor:
    """Windows in which some passages are written over by copies of earlier ones.

    Ordinary text seldom asks for a single far token; a copied passage does so in every row but its first few.
    In some windows one passage comes again and again between the others, as in logs and tables: there what
    is looked up is rare, and all else alike.

    Args:
        windows: (count, length) int64.
        share: Tokens written over by copies, over ``length``, at least 0 and below 1.
        first: Position from which on passages are written over: rows before it have no far field.
        seed: The same seed gives the same copies.

    Returns:
        (count, length) int64; ``windows`` itself where ``share`` is 0.

    """
    length = windows.shape[1]
    if share == 0 or length - first <= LONGEST:
        return windows
    windows = windows.clone()
    for number, ids in enumerate(windows):
        rng = random.Random(seed * 1_000_003 + number)
        if number % REFRAIN == REFRAIN - 1:
            _add_refrain(ids, rng)
        written = 0
        while written < share * length:
            size = _size(rng)
            at = rng.randrange(first, length - size)
            begin = rng.randrange(at - size)
            ids[at : at + size] = ids[begin : begin + size].clone()
            written += size
    return windows


def _add_refrain(ids: torch.Tensor, rng: random.Random) -> None:
    """Write a passage over most of a window (length,), several times between passages that stay."""
    length, size = len(ids), _size(rng)
    begin = rng.randrange(length - size)
    passage = ids[begin : begin + size].clone()
    at = _size(rng)
    while at < length:
        refrain = passage.repeat(rng.randint(1, TIMES))[: length - at]
        ids[at : at + len(refrain)] = refrain
        at += len(refrain) + _size(rng)


def _size(rng: random.Random) -> int:
    """Tokens of a passage: the logarithm is uniform."""
    return round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
