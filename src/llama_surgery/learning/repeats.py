"""Windows in which passages come again: rows that must look up what was said far back."""

import random

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import first_far

#: Tokens of a repeated passage, at least and at most.
SHORTEST, LONGEST = 8, 128


def with_repeats(windows: torch.Tensor, share: float, config: SurgeryConfig, seed: int) -> torch.Tensor:
    """Windows in which some passages are written over by copies of earlier ones.

    Ordinary text seldom asks for a single far token; a copied passage does so in every row but its first few.
    Copies of copies come about too: text that says the same many times.

    Args:
        windows: (count, length) int64.
        share: Tokens written over, of those that may be, at least 0 and below 1.
        config: Geometry: rows without a far field, and the first LONGEST, are left as they are.
        seed: The same seed gives the same copies.

    Returns:
        (count, length) int64; ``windows`` itself where nothing is written over.
    """
    length, first = windows.shape[1], max(first_far(config), LONGEST + 1)
    if share == 0 or length - first <= LONGEST:
        return windows
    windows = windows.clone()
    for number, ids in enumerate(windows):
        rng, written = random.Random(seed * 1_000_003 + number), 0
        while written < share * (length - first):
            size = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
            at = rng.randrange(first, length - size)
            begin = rng.randrange(at - size)
            ids[at : at + size] = ids[begin : begin + size].clone()
            written += size
    return windows
