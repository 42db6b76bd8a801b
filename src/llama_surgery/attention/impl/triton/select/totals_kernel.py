"""The first kernel of selection: totals of the rows.

Row m of a matrix tile is head ``m % HEADS_BLOCK`` of query ``m // HEADS_BLOCK % TILE_PAD`` of tile
``m // (HEADS_BLOCK * TILE_PAD)`` of the program's TILES_BLOCK tiles. Nothing of the size queries x pages is
ever written.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LOG2E,
    cap_logits,
    closed_chunks,
    load_rows,
    sum_step,
)
from llama_surgery.attention.impl.triton.select.page_scores import page_terms, page_weights, score_factors


@triton.jit
def rows_of_tiles(
    block,
    head_block,
    first_tile,
    tiles,
    start,
    stop,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_PAD: tl.constexpr,
):
    """For every row of the matrix tile: tile of the launch, head, position, is it a real row."""
    m = tl.arange(0, TILES_BLOCK * TILE_PAD * HEADS_BLOCK)
    head = head_block * HEADS_BLOCK + m % HEADS_BLOCK
    query = m // HEADS_BLOCK % TILE_PAD
    tile = block * TILES_BLOCK + m // (HEADS_BLOCK * TILE_PAD)
    position = (first_tile + tile) * TILE + query
    live = (head < HEADS) & (query < TILE) & (tile < tiles) & (position >= start) & (position < stop)
    return tile, head, position, live


@triton.jit(
    do_not_specialize=["tiles", "start", "stop", "near_start", "first_tile", "dense_until"],
)
def totals_kernel(
    q_ptr,
    near_k,
    means,
    spreads,
    sink_ptr,
    offset_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    q_chooser,
    q_head,
    q_row,
    tiles,
    start,
    stop,
    near_start,
    first_tile,
    dense_until,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    LOG2_PAGE: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Log-sum-exp, in log2 units, of every row's whole attention as selection sees it.

    The near field is exact, closed pages count by what they would weigh in place of their keys, attention
    sinks are included. With ``offset_ptr`` (choosers, HEADS) float32 a head's totals are raised by it: what
    is added to log θ. Weights of channels are those of ``score_factors``. Rows without closed chunks are left
    unwritten. Grid: (blocks of tiles * blocks of heads, choosers), GROUP choosers to a stream. Writes
    (choosers, tiles, TILE, HEADS) float32.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    chooser = tl.program_id(1)
    wide_chooser = chooser.to(tl.int64)
    stream = chooser // GROUP
    tile, head, position, live = rows_of_tiles(
        tl.program_id(0) // head_blocks,
        tl.program_id(0) % head_blocks,
        first_tile,
        tiles,
        start,
        stop,
        HEADS,
        HEADS_BLOCK,
        TILES_BLOCK,
        TILE,
        TILE_PAD,
    )
    closed = closed_chunks((first_tile + tile) * TILE, CHUNK, WINDOW, dense_until)
    live = live & (closed > 0)
    most = tl.max(tl.where(live, closed, 0), 0)
    least = tl.min(tl.where(live, closed, most), 0)
    if most > 0:
        q_offset = head.to(tl.int64) * q_head + (position - start).to(tl.int64) * q_row
        q = load_rows(q_ptr + wide_chooser * q_chooser, q_offset, 1, live, DIM, DIM_PAD, True)
        rows: tl.constexpr = TILES_BLOCK * TILE_PAD * HEADS_BLOCK
        top = tl.full([rows], FLOOR, tl.float32)
        total = tl.zeros([rows], tl.float32)
        if SINK:
            sink = tl.load(sink_ptr + chooser * HEADS + head, mask=head < HEADS, other=0.0)
            top = tl.maximum(sink.to(tl.float32) * LOG2E, FLOOR)
            total = total + 1.0
        factor = scale * LOG2E
        if CAP:
            factor = 1.0
        end = tl.max(tl.where(live, position, -1), 0) + 1
        # Keys up to the first query are seen by every row whose near field begins as early: only what follows
        # needs the mask.
        masked = least * CHUNK
        seen = (first_tile + tl.program_id(0) // head_blocks * TILES_BLOCK) * TILE + 1 - masked
        masked += tl.where(least == most, tl.maximum(seen, 0) // BLOCK_NEAR * BLOCK_NEAR, 0)
        for block in range(least * CHUNK, masked, BLOCK_NEAR):
            k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
            products = tl.dot(q, tl.trans(k))
            logits = cap_logits(products, scale, softcap, CAP) * factor
            total, top = sum_step(total, top, logits)
        for block in range(masked, end, BLOCK_NEAR):
            key = block + tl.arange(0, BLOCK_NEAR)
            k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
            products = tl.dot(q, tl.trans(k))
            logits = cap_logits(products, scale, softcap, CAP) * factor
            visible = (key[None, :] >= (closed * CHUNK)[:, None]) & (key[None, :] <= position[:, None])
            total, top = sum_step(total, top, tl.where(visible, logits, float("-inf")))
        q, squares = score_factors(
            q, scale, mean_weight_ptr, variance_weight_ptr, chooser,
            tl.program_id(0) % head_blocks * HEADS_BLOCK, HEADS, HEADS_BLOCK, True,
            DIM, DIM_PAD, SPREAD, SPREAD_PAD,
        )  # fmt: skip
        per_chunk: tl.constexpr = CHUNK // PAGE
        # Pages closed for every row of the block need no mask.
        common = least * per_chunk // BLOCK_PAGES * BLOCK_PAGES
        for block in range(0, common, BLOCK_PAGES):
            mean = means.load([stream, block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
            spread = spreads.load([stream, block, 0]).reshape(BLOCK_PAGES, SPREAD_PAD)
            along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
            weights = page_weights(along, across, LOG2_PAGE)
            total, top = sum_step(total, top, weights)
        for block in range(common, most * per_chunk, BLOCK_PAGES):
            page = block + tl.arange(0, BLOCK_PAGES)
            mean = means.load([stream, block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
            spread = spreads.load([stream, block, 0]).reshape(BLOCK_PAGES, SPREAD_PAD)
            along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
            weights = page_weights(along, across, LOG2_PAGE)
            far = page[None, :] < (closed * per_chunk)[:, None]
            total, top = sum_step(total, top, tl.where(far, weights, float("-inf")))
        row = position - (first_tile + tile) * TILE
        cell = ((wide_chooser * tiles + tile) * TILE + row) * HEADS + head
        if offset_ptr is not None:
            top += tl.load(offset_ptr + chooser * HEADS + head, mask=live, other=0.0) * LOG2E
        tl.store(totals_ptr + cell, top + tl.log2(total), mask=live)
