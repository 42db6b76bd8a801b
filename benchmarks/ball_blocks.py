"""Blocks that some row of a tile sees a key of, sorted by ball and in the order of the text."""

from collections.abc import Callable

import torch

from llama_surgery.gumbel.balls import Intervals, ball_mask
from llama_surgery.gumbel.layer import GumbelLayer


def listen(layer: GumbelLayer, listener: Callable[[torch.Tensor], None]) -> None:
    """Have ``listener`` hear the balls (batch, heads, n) of every call of an operated layer."""
    route = layer.route

    def heard(hidden: torch.Tensor, held: object) -> object:
        routed = route(hidden, held)
        listener(routed.balls)
        return routed

    layer.route = heard


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
