"""The rule of the token-masked mode, as a boolean matrix (the oracle) and as one interval per row.

Keys of the whole past are sorted by path, ties by position. A ball is then one interval, and so is what a row
may see of it besides sinks and window: its positions from the sinks on and before the window. Comparing a
slot with two numbers compares branches and positions at once, and no key counts twice.
"""

import dataclasses

import torch

from llama_surgery.errors import SurgeryError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallRule:
    """What a row sees: sinks, window, and its ball of radius ``radius``, all causal.

    Attributes:
        levels: Digits of a path, L.
        radius: Keys are seen whose paths share the first ``levels - radius`` digits.
        arity: Values of a digit.
        window: Last positions that are always seen, the row's own included.
        sinks: First positions that are always seen.

    Raises:
        SurgeryError: A value is out of range.
    """

    levels: int
    radius: int
    arity: int = 2
    window: int = 128
    sinks: int = 1

    def __post_init__(self) -> None:
        for name, low in (("levels", 1), ("radius", 0), ("arity", 2), ("window", 1), ("sinks", 0)):
            if getattr(self, name) < low:
                raise SurgeryError(f"{name}={getattr(self, name)}: must be at least {low}.")
        if self.radius > self.levels:
            raise SurgeryError(f"radius={self.radius}: must be at most levels={self.levels}.")

    @property
    def leaves(self) -> int:
        """Leaves of a ball: paths that share its digits."""
        return self.arity**self.radius

    @property
    def balls(self) -> int:
        return self.arity ** (self.levels - self.radius)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rows and keys in tree order, and which keys a row sees beyond sinks and window.

    Attributes:
        key_order: (streams, keys) int64, the position at every slot.
        row_order: (streams, heads, rows) int32, the row at every place.
        low, high: (streams, heads, rows) int32, first slot that the row at a place sees, and one past the
            last.
    """

    key_order: torch.Tensor
    row_order: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def pack_paths(digits: torch.Tensor, arity: int) -> torch.Tensor:
    """Digits (..., levels), 0 … arity - 1, the root's first, to int64 paths (...)."""
    levels = digits.shape[-1]
    places = arity ** torch.arange(levels - 1, -1, -1, device=digits.device)
    return (digits.long() * places).sum(-1)


def token_mask(query_paths: torch.Tensor, key_paths: torch.Tensor, rule: BallRule) -> torch.Tensor:
    """The rule as a boolean matrix: the oracle.

    Args:
        query_paths: (streams, heads, rows) int64 of the last rows, from :func:`pack_paths`.
        key_paths: (streams, keys) int64 of all positions.

    Returns:
        (streams, heads, rows, keys) bool.
    """
    rows, keys = query_paths.shape[-1], key_paths.shape[-1]
    key = torch.arange(keys, device=key_paths.device)
    row = key[keys - rows :, None]
    ball = (query_paths // rule.leaves).unsqueeze(-1) == (key_paths // rule.leaves)[:, None, None]
    return (ball | (key < rule.sinks) | (key > row - rule.window)) & (key <= row)


def ball_intervals(query_paths: torch.Tensor, key_paths: torch.Tensor, rule: BallRule) -> Intervals:
    """Sort rows and keys by ball and position, and find what rows see. Arguments as in :func:`token_mask`."""
    streams, heads, rows = query_paths.shape
    keys = key_paths.shape[-1]
    position = torch.arange(keys, device=key_paths.device)
    ranks, key_order = (key_paths.long() // rule.leaves * keys + position).sort(-1)
    row_position = position[keys - rows :]
    first = query_paths.long() // rule.leaves * keys
    row_ranks, row_order = (first + row_position).sort(-1)
    first = row_ranks - row_ranks % keys
    before_window = (row_ranks % keys - rule.window + 1).clamp_min(0)

    def find(rank: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(ranks, rank.flatten(1), out_int32=True).view(streams, heads, rows)

    low = find(first + min(rule.sinks, keys))
    return Intervals(key_order, row_order.int(), low, find(first + before_window).maximum(low))


def near_pairs(rows: int, rule: BallRule) -> int:
    """Pairs of sinks and window of the first ``rows`` rows of a text."""

    def ramp(length: int, most: int) -> int:
        """Sum of min(i, most) for i = 1 … length."""
        rising = min(length, most)
        return rising * (rising + 1) // 2 + most * (length - rising)

    return ramp(rows, rule.window) + ramp(max(0, rows - rule.window), rule.sinks)
