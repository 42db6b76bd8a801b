"""Executes the token-masked mode: every row sees exactly position 0, its window and the keys of its own ball.

Rows are sorted as keys are, so that a tile's rows share a ball and its lists are short.
"""

from typing import Any

import torch
import triton

from llama_surgery.attention.impl.triton.helpers import launching, pad_to_power, product_options
from llama_surgery.attention.impl.triton.job import STRIP_BYTES
from llama_surgery.attention.impl.triton.tuning import family_of, tuning_for
from llama_surgery.gumbel.balls import (
    Intervals,
    TreeOrder,
    always_pairs,
    ball_intervals,
    tree_order,
    window_pairs_read,
)
from llama_surgery.gumbel.token_mask_kernels import (
    ball_kernel,
    ball_list_kernel,
    window_kernel,
)

#: Rows of a tile: more of them share fewer pages, fewer do not fill a matrix unit.
LARGEST_TILE, SMALLEST_TILE = 64, 16

#: Pages that the list kernel holds at once.
LIST_BLOCK = 64

#: Where rows make a single tile, programs share its pages: at most so many in all, each with at least so many
#: pages of the text.
PROGRAMS, PAGES_OF_A_SHARE = 256, 8


def tile_and_page(queries: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    """Rows of a tile and keys of a page that a call on these tensors is executed with."""
    tuning = tuning_for(
        family_of(queries.device), max(queries.shape[-1], values.shape[-1]), queries.element_size()
    )
    most = min(tuning.rows, LARGEST_TILE)
    return min(most, max(SMALLEST_TILE, triton.next_power_of_2(queries.shape[2]))), tuning.block_near


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    balls: torch.Tensor,
    window: int,
    scale: float,
    order: TreeOrder | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, pairs seen and read of :func:`llama_surgery.gumbel.attend.attend_balls`.

    Nothing is read back to the host.
    """
    batch, heads, rows, dim = queries.shape
    count, value_dim = keys.shape[2], values.shape[-1]
    tile, page = tile_and_page(queries, values)
    tuning = tuning_for(family_of(queries.device), max(dim, value_dim), queries.element_size())
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values))
    strides = (*queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3])
    shared = {
        "HEADS": heads,
        "GROUP": heads // keys.shape[1],
        "TILE": tile,
        "PAGE": page,
        "DIM": dim,
        "DIM_PAD": pad_to_power(dim),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": pad_to_power(value_dim),
        "num_warps": tuning.attend_warps,
        "num_stages": tuning.attend_stages,
        **product_options(queries),
    }
    near_out = queries.new_empty(batch, heads, rows, value_dim, dtype=torch.float32)
    near_lse = near_out.new_empty(batch, heads, rows)
    tiles = triton.cdiv(rows, tile)
    order = tree_order(balls) if order is None else order
    found = ball_intervals(order, balls, rows, window)
    with launching(queries):
        window_kernel[(tiles, heads, batch)](
            queries,
            keys,
            values,
            near_out,
            near_lse,
            *strides,
            rows,
            count,
            window,
            scale,
            **shared,
        )
        out, lse, counts = _over_balls(
            queries, keys, values, order, found, near_out, near_lse, strides, scale, shared
        )
    rows_of = torch.full((tiles,), tile, device=counts.device)
    rows_of[-1] = rows - (tiles - 1) * tile
    read = (counts * rows_of).sum(-1) * page + window_pairs_read(count, rows, window, tile, page)
    seen = (found.high - found.low).long().sum(-1) + always_pairs(count, window)
    return out, lse, seen - always_pairs(count - rows, window), read


def _over_balls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    order: TreeOrder,
    found: Intervals,
    near_out: torch.Tensor,
    near_lse: torch.Tensor,
    strides: tuple[int, ...],
    scale: float,
    shared: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List pages and go on over them, a strip of tiles at a time.

    A single tile, of a decode step, has too few programs to fill a GPU: they share its pages.

    Returns:
        Output, log-sum-exp, and the pages that tiles read, (batch, heads, tiles) int64.
    """
    batch, heads, rows, _ = queries.shape
    tile, page = shared["TILE"], shared["PAGE"]
    tiles, capacity, counts = triton.cdiv(rows, tile), triton.cdiv(order.slots, page), []
    shares = 1
    if tiles == 1:
        shares = max(1, min(PROGRAMS // (batch * heads), capacity // PAGES_OF_A_SHARE))
    dtype = queries.dtype if shares == 1 else near_out.dtype
    out = near_out.new_empty(shares, *near_out.shape, dtype=dtype)
    lse = near_lse.new_empty(shares, *near_lse.shape)
    room = max(1, STRIP_BYTES // (4 * batch * heads * capacity))
    for first in range(0, tiles, room):
        strip = min(room, tiles - first)
        pages = found.low.new_empty(batch, heads, strip, capacity)
        counts.append(found.low.new_empty(batch, heads, strip))
        grid = (strip, batch * heads)
        ball_list_kernel[grid](
            found.low,
            found.high,
            pages,
            counts[-1],
            rows,
            first,
            capacity,
            TILE=tile,
            PAGE=page,
            BLOCK=LIST_BLOCK,
        )
        ball_kernel[(*grid, shares)](
            queries,
            keys,
            values,
            order.positions,
            found.row_order,
            found.low,
            found.high,
            pages,
            counts[-1],
            near_out,
            near_lse,
            out,
            lse,
            *strides,
            rows,
            order.slots,
            first,
            capacity,
            scale,
            **shared,
        )
    read = torch.cat(counts, -1).long()
    if shares == 1:
        return out[0], lse[0], read
    total = lse.logsumexp(0)
    weights = (lse - total).exp().unsqueeze(-1)
    return (out * weights).sum(0).to(queries.dtype), total, read
