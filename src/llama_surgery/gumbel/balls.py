"""What a row sees under the ``gumbel`` topology: position 0, its window, and the tokens of its own ball.

Tokens are sorted by ball, ties by position. A ball is then one interval, and so is what a row may see of it
besides position 0 and window: its positions from 1 on and before the window. Comparing a slot with two
numbers compares branches and positions at once, and no key counts twice.
"""

import dataclasses

import torch

#: Bits of a rank that hold the position; the others hold the ball.
POSITION_BITS = 31


@dataclasses.dataclass(frozen=True)
class TreeOrder:
    """The first tokens of a text sorted by ball, ties by position.

    Attributes:
        ranks: (batch, heads, slots) int64, ascending: ball · 2³¹ + position.
        positions: (batch, heads, slots) int32, the position at every slot.
    """

    ranks: torch.Tensor
    positions: torch.Tensor

    @property
    def slots(self) -> int:
        """How many of the first tokens are sorted."""
        return self.ranks.shape[-1]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rows in tree order, and which slots a row sees beyond position 0 and window.

    Attributes:
        row_order: (batch, heads, rows) int32, the row at every place.
        low, high: (batch, heads, rows) int32, first slot that the row at a place sees, and one past the last.
    """

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


def tree_order(balls: torch.Tensor) -> TreeOrder:
    """Sort tokens by ball.

    Args:
        balls: (batch, heads, n) int64, below 2³².
    """
    position = torch.arange(balls.shape[-1], device=balls.device)
    ranks, positions = ((balls << POSITION_BITS) + position).sort(-1)
    return TreeOrder(ranks, positions.int())


def order_serves(order: TreeOrder, count: int, window: int) -> bool:
    """Does an order hold everything that the last rows of ``count`` tokens see beside their windows?

    So it need not be made anew for every token.
    """
    return order.slots >= count - window


def ball_intervals(order: TreeOrder, balls: torch.Tensor, rows: int, window: int) -> Intervals:
    """Sort rows as keys are sorted, and find what they see.

    Args:
        order: Of the first tokens, as many as :func:`order_serves` asks for.
        balls: (batch, heads, n) int64.
        rows: How many of the last tokens are rows.
        window: As in :func:`always_visible`.
    """
    count = balls.shape[-1]
    if rows == order.slots:
        row_ranks, row_order = order.ranks, order.positions
    else:
        position = torch.arange(count - rows, count, device=balls.device)
        row_ranks, places = ((balls[..., count - rows :] << POSITION_BITS) + position).sort(-1)
        row_order = places.int()
    position = row_ranks & (1 << POSITION_BITS) - 1
    first = row_ranks - position

    def find(rank: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(order.ranks, rank, out_int32=True)

    low = find(first + 1)
    high = find(first + (position - window + 1).clamp_min(0))
    return Intervals(row_order, low, high.maximum(low))


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
