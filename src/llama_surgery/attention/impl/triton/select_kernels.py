"""The first kernel of selection: totals of the scored rows.

A *slot* is a scored row of a tile: every ``STRIDE``-th query, the tile's first one always. Row m of a
matrix tile is head ``m % HEADS_BLOCK`` of slot ``m // HEADS_BLOCK % SLOTS_PAD`` of tile
``m // (HEADS_BLOCK * SLOTS_PAD)`` of the program's TILES_BLOCK tiles. Nothing of the size queries x pages
is ever written.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LOG2E,
    ball_scores,
    cap_logits,
    closed_chunks,
    load_rows,
    score_factors,
    sum_step,
)


@triton.jit
def slots_of(
    block,
    head_block,
    first_tile,
    tiles,
    start,
    stop,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """For every row of the matrix tile: tile of the launch, slot, head, position, is it a real row.

    Where a call begins between two slots, its first row stands for the slot before it.
    """
    m = tl.arange(0, TILES_BLOCK * SLOTS_PAD * HEADS_BLOCK)
    head = head_block * HEADS_BLOCK + m % HEADS_BLOCK
    slot = m // HEADS_BLOCK % SLOTS_PAD
    tile = block * TILES_BLOCK + m // (HEADS_BLOCK * SLOTS_PAD)
    position = (first_tile + tile) * TILE + slot * (TILE // SLOTS)
    live = (head < HEADS) & (slot < SLOTS) & (tile < tiles)
    live = live & (position + TILE // SLOTS > start) & (position < stop)
    position = tl.maximum(position, start)
    return tile, slot, head, position, live


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
    q_stream,
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
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    BALL: tl.constexpr,
    LOG2_BALL: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
    BLOCK_BALLS: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Log-sum-exp, in log2 units, of every scored row's whole attention as selection sees it.

    The near field is exact, closed balls count by their scores, attention sinks are included. With
    ``offset_ptr`` (streams, HEADS) float32 a head's totals are raised by it: what is added to log θ. Weights
    of channels are those of ``score_factors``. Rows without closed chunks are left unwritten. NEAR and FAR
    leave a part out, for timing. Grid: (blocks of tiles * blocks of heads, streams). Writes (streams, tiles,
    SLOTS, HEADS) float32.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    stream = tl.program_id(1)
    wide_stream = stream.to(tl.int64)
    tile, slot, head, position, live = slots_of(
        tl.program_id(0) // head_blocks,
        tl.program_id(0) % head_blocks,
        first_tile,
        tiles,
        start,
        stop,
        HEADS,
        HEADS_BLOCK,
        SLOTS,
        SLOTS_PAD,
        TILES_BLOCK,
        TILE,
    )
    closed = closed_chunks((first_tile + tile) * TILE, CHUNK, WINDOW, dense_until)
    live = live & (closed > 0)
    most = tl.max(tl.where(live, closed, 0), 0)
    least = tl.min(tl.where(live, closed, most), 0)
    if most > 0:
        q_offset = head.to(tl.int64) * q_head + (position - start).to(tl.int64) * q_row
        q = load_rows(q_ptr + wide_stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
        rows: tl.constexpr = TILES_BLOCK * SLOTS_PAD * HEADS_BLOCK
        top = tl.full([rows], FLOOR, tl.float32)
        total = tl.zeros([rows], tl.float32)
        if SINK:
            sink = tl.load(sink_ptr + stream * HEADS + head, mask=head < HEADS, other=0.0)
            top = tl.maximum(sink.to(tl.float32) * LOG2E, FLOOR)
            total = total + 1.0
        if NEAR:
            factor = scale * LOG2E
            if CAP:
                factor = 1.0
            end = tl.max(tl.where(live, position, -1), 0) + 1
            masked = least * CHUNK
            if TILES_BLOCK == 1:
                # Keys up to the tile's first query are seen by every row: only what follows needs the mask.
                seen = (first_tile + tl.program_id(0) // head_blocks) * TILE + 1 - masked
                masked += tl.maximum(seen, 0) // BLOCK_NEAR * BLOCK_NEAR
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
        if FAR:
            q, squares = score_factors(
                q, scale, mean_weight_ptr, variance_weight_ptr, stream,
                tl.program_id(0) % head_blocks * HEADS_BLOCK, HEADS, HEADS_BLOCK, True,
                DIM, DIM_PAD, SPREAD, SPREAD_PAD,
            )  # fmt: skip
            per_chunk: tl.constexpr = CHUNK // BALL
            # Balls closed for every row of the block need no mask.
            common = least * per_chunk // BLOCK_BALLS * BLOCK_BALLS
            for block in range(0, common, BLOCK_BALLS):
                mean = means.load([stream, block, 0]).reshape(BLOCK_BALLS, DIM_PAD)
                spread = spreads.load([stream, block, 0]).reshape(BLOCK_BALLS, SPREAD_PAD)
                scores = ball_scores(q, squares, mean, spread, scale, softcap, LOG2_BALL, CAP)
                total, top = sum_step(total, top, scores)
            for block in range(common, most * per_chunk, BLOCK_BALLS):
                ball = block + tl.arange(0, BLOCK_BALLS)
                mean = means.load([stream, block, 0]).reshape(BLOCK_BALLS, DIM_PAD)
                spread = spreads.load([stream, block, 0]).reshape(BLOCK_BALLS, SPREAD_PAD)
                scores = ball_scores(q, squares, mean, spread, scale, softcap, LOG2_BALL, CAP)
                far = ball[None, :] < (closed * per_chunk)[:, None]
                total, top = sum_step(total, top, tl.where(far, scores, float("-inf")))
        cell = ((wide_stream * tiles + tile) * SLOTS + slot) * HEADS + head
        if offset_ptr is not None:
            top += tl.load(offset_ptr + stream * HEADS + head, mask=live, other=0.0) * LOG2E
        tl.store(totals_ptr + cell, top + tl.log2(total), mask=live)
