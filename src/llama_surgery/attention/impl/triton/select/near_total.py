"""Rows of selection's matrix tiles, and what their near fields weigh."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import FLOOR, LOG2E, cap_logits, sum_step

#: Weights are kept this many powers of two above 1, so that small ones are exact in float16.
BOOST = tl.constexpr(14.0)


@triton.jit
def rows_of_tiles(
    block,
    q_first,
    tiles,
    start,
    stop,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_PAD: tl.constexpr,
):
    """For every row of the matrix tile, whose first query is at ``q_first``: head, row of its tile, position,
    is it a real row."""
    m = tl.arange(0, TILES_BLOCK * TILE_PAD * HEADS_BLOCK)
    head = m % HEADS_BLOCK
    query = m // HEADS_BLOCK % TILE_PAD
    tile = m // (HEADS_BLOCK * TILE_PAD)
    position = q_first + tile * TILE + query
    live = (head < HEADS) & (query < TILE) & (block * TILES_BLOCK + tile < tiles)
    return head, query, position, live & (position >= start) & (position < stop)


@triton.jit
def near_total(
    near_k, q, sink, stream, position, live, begin, least, most, q_first, near_start, scale, softcap,
    BLOCK_NEAR: tl.constexpr, DIM_PAD: tl.constexpr, SINK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the near field and of attention sinks: sums relative to a running maximum, and that."""
    top = tl.full(position.shape, FLOOR, tl.float32)
    total = tl.zeros(position.shape, tl.float32)
    if SINK:
        top = tl.maximum(sink.to(tl.float32) * LOG2E, FLOOR)
        total = total + 1.0
    factor = scale * LOG2E
    if CAP:
        factor = 1.0
    end = tl.max(tl.where(live, position, -1), 0) + 1
    # Keys up to the first query are seen by every row whose near field begins as early: only what follows
    # needs the mask.
    masked = least + tl.where(least == most, tl.maximum(q_first + 1 - least, 0) // BLOCK_NEAR * BLOCK_NEAR, 0)
    for block in range(least, masked, BLOCK_NEAR):
        k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
        products = tl.dot(q, tl.trans(k))
        logits = cap_logits(products, scale, softcap, CAP) * factor
        total, top = sum_step(total, top, logits)
    for block in range(masked, end, BLOCK_NEAR):
        key = block + tl.arange(0, BLOCK_NEAR)
        k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
        products = tl.dot(q, tl.trans(k))
        logits = cap_logits(products, scale, softcap, CAP) * factor
        visible = (key[None, :] >= begin[:, None]) & (key[None, :] <= position[:, None])
        total, top = sum_step(total, top, tl.where(visible, logits, float("-inf")))
    return total * tl.exp2(BOOST), top - BOOST
