"""Blocks that some row of a tile sees a key of, sorted by ball and in the order of the text."""

from collections.abc import Callable

import torch

from llama_surgery.gumbel.balls import ball_mask
from llama_surgery.gumbel.layer import GumbelLayer


def listen(layer: GumbelLayer, listener: Callable[[torch.Tensor], None]) -> None:
    """Have ``listener`` hear the balls (batch, heads, n) of every call of an operated layer."""
    route = layer.route

    def heard(hidden: torch.Tensor, held: object) -> object:
        routed = route(hidden, held)
        listener(routed)
        return routed

    layer.route = heard


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
    for rows in torch.arange(count, device=balls.device).split(tile):
        counts.append(_blocks(ball_mask(balls, rows, window), block))
    return torch.stack(counts, -1)


def blocks_sorted(balls: torch.Tensor, window: int, tile: int, block: int) -> torch.Tensor:
    """The same with rows and keys of each head sorted by ball, ties by position.

    Position 0 and window are read apart, in order of the text: see :func:`window_pairs_read`. Arguments and
    result are those of :func:`blocks_in_order_of_text`.
    """
    count = balls.shape[-1]
    order = balls.argsort(stable=True)
    balls, counts = balls.gather(-1, order), []
    for part in torch.arange(count, device=balls.device).split(tile):
        rows, own = order[..., part, None], balls[..., part, None]
        keys = order.unsqueeze(-2)
        far = (keys <= rows - window) & (keys > 0)
        counts.append(_blocks(far & (balls.unsqueeze(-2) == own), block))
    return torch.stack(counts, -1)


def window_pairs_read(count: int, window: int, tile: int, block: int) -> int:
    """Pairs that tiles multiply for position 0 and window: of all their rows, with all keys of a block.

    Position 0 is taken alone; blocks begin where the window of a tile's first row does.
    """
    pairs = count
    for first in range(0, count, tile):
        end = min(first + tile, count)
        pairs += (end - first) * -(-(end - max(first - window + 1, 1)) // block) * block
    return pairs


def _blocks(mask: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks of columns of (..., rows, n) of which some row sees some: (...) int64."""
    seen = torch.nn.functional.pad(mask.any(-2), (0, -mask.shape[-1] % block))
    return seen.unflatten(-1, (-1, block)).any(-1).sum(-1)
