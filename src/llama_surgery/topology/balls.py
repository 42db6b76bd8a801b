"""What a row sees under the ``gumbel`` topology: position 0, its window, and the tokens of its own ball.

Tokens are sorted by ball, ties by position. A ball is then one interval, and so is what a row may see of it
besides position 0 and window: its positions from 1 on and before the window. Comparing a slot with two
numbers compares branches and positions at once, and no key counts twice.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rows and keys in tree order, and which keys a row sees beyond position 0 and window.

    Attributes:
        key_order: (batch, heads, keys) int32, the position at every slot.
        row_order: (batch, heads, rows) int32, the row at every place.
        low, high: (batch, heads, rows) int32, first slot that the row at a place sees, and one past the last.
    """

    key_order: torch.Tensor
    row_order: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def ball_ids(digits: torch.Tensor, arity: int, radius: int) -> torch.Tensor:
    """The ball of radius ``radius`` that every token is in, as a number.

    The distance of two tokens is levels less the number of *last* digits they share, so a ball is named by
    the last levels − radius digits; radius ≥ levels leaves one ball.

    Args:
        digits: (..., levels) int64, 0 … arity − 1.
        arity: Values of a digit.
        radius: Largest distance inside a ball.

    Returns:
        (...) int64, below ``arity ** max(0, levels - radius)``.
    """
    naming = digits[..., radius:]
    places = arity ** torch.arange(naming.shape[-1], device=digits.device)
    return (naming * places).sum(-1)


def always_visible(rows: torch.Tensor, keys: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, keys) masks: what every row sees (position 0 and its window), and what it may see at all.

    Args:
        rows: (rows,) positions.
        keys: (keys,) positions.
        window: Last positions that are always seen, the row's own counted.
    """
    causal = keys <= rows[:, None]
    return causal & ((keys == 0) | (rows[:, None] - keys < window)), causal


def ball_mask(balls: torch.Tensor, rows: torch.Tensor, window: int) -> torch.Tensor:
    """What rows see, as a boolean matrix: the oracle.

    Args:
        balls: (..., n) int64 of all tokens up to the last row at least.
        rows: (rows,) positions.
        window: As in :func:`always_visible`.

    Returns:
        (..., rows, n) bool.
    """
    keys = torch.arange(balls.shape[-1], device=balls.device)
    always, causal = always_visible(rows, keys, window)
    return always | (causal & (balls[..., rows].unsqueeze(-1) == balls.unsqueeze(-2)))


def ball_intervals(balls: torch.Tensor, rows: int, window: int) -> Intervals:
    """Sort rows and keys by ball and position, and find what rows see.

    Args:
        balls: (batch, heads, n) int64, all of them times n below 2⁶³.
        rows: How many of the last tokens are rows.
        window: As in :func:`always_visible`.
    """
    count = balls.shape[-1]
    ranks, key_order = (balls * count + torch.arange(count, device=balls.device)).sort(-1)
    row_ranks, row_order = ranks, key_order
    if rows < count:
        last = torch.arange(count - rows, count, device=balls.device)
        row_ranks, row_order = (balls[..., count - rows :] * count + last).sort(-1)
    position = row_ranks % count
    first = row_ranks - position

    def find(rank: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(ranks, rank, out_int32=True)

    low = find(first + 1)
    high = find(first + (position - window + 1).clamp_min(0))
    return Intervals(key_order.int(), row_order.int(), low, high.maximum(low))


def always_pairs(rows: int, window: int) -> int:
    """(Query, key) pairs of position 0 and window, of the first ``rows`` rows of a text."""
    full = min(rows, window)
    return full * (full + 1) // 2 + (rows - full) * (window + 1)


def window_pairs_read(count: int, rows: int, window: int, tile: int, page: int) -> int:
    """Pairs that tiles multiply for position 0 and window: of all their rows, with all keys of a block.

    Position 0 is taken alone; blocks of ``page`` keys begin where the window of a tile's first row does.

    Args:
        count: Tokens of the text.
        rows: How many of the last of them are rows.
        window: As in :func:`always_visible`.
        tile: Rows of a tile.
        page: Keys of a block.
    """
    pairs = rows
    for first in range(count - rows, count, tile):
        end = min(first + tile, count)
        blocks = -(-(end - max(first - window + 1, 1)) // page)
        pairs += (end - first) * blocks * page
    return pairs


def pages_read(found: Intervals, tile: int, page: int) -> torch.Tensor:
    """Pages of ``page`` slots that some row of a tile of ``tile`` places sees a key of.

    Returns:
        (batch, heads, tiles) int64.
    """
    sees = found.high > found.low
    # Places ascend by ball: a tile's intervals are sorted by their starts, those that see nothing left out.
    begin = torch.where(sees, found.low // page, 0).long()
    end = torch.where(sees, (found.high + page - 1) // page, 0).long()
    begin, end = (
        torch.nn.functional.pad(x, (0, -x.shape[-1] % tile)).unflatten(-1, (-1, tile)) for x in (begin, end)
    )
    covered = torch.nn.functional.pad(end.cummax(-1).values[..., :-1], (1, 0))
    return (end - begin.maximum(covered)).clamp_min(0).sum(-1)


def blocks_in_order_of_text(balls: torch.Tensor, window: int, tile: int, block: int) -> torch.Tensor:
    """Blocks of ``block`` keys that some row of a tile sees a key of, with nothing sorted.

    Every other block could be skipped by a kernel that reads keys as they come.

    Args:
        balls: (batch, heads, n) int64; rows are all n tokens.
        window: As in :func:`always_visible`.
        tile: Consecutive rows computed together.
        block: Consecutive keys read together.

    Returns:
        (batch, heads, tiles) int64, blocks with position 0 or keys of the window included.
    """
    count, counts = balls.shape[-1], []
    for first in range(0, count, tile):
        rows = torch.arange(first, min(first + tile, count), device=balls.device)
        seen = ball_mask(balls, rows, window).any(-2)
        seen = torch.nn.functional.pad(seen, (0, -count % block)).unflatten(-1, (-1, block))
        counts.append(seen.any(-1).sum(-1))
    return torch.stack(counts, -1)
