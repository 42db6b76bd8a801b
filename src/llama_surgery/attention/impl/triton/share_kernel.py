"""The kernel that writes shares of pages down, for rules that compare a row's pages with each other."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    LOG2E,
    ball_terms,
    closed_chunks,
    load_rows,
    score_factors,
    sum_of_balls,
)


@triton.jit(do_not_specialize=["tiles", "capacity", "start", "stop", "first_tile", "dense_until"])
def share_kernel(
    q_ptr,
    features_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    shares_ptr,
    q_stream,
    q_head,
    q_row,
    features_stream,
    features_row,
    tiles,
    capacity,
    start,
    stop,
    first_tile,
    dense_until,
    scale,
    softcap,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    LOG2_BALL: tl.constexpr,
    BALLS: tl.constexpr,
    BALLS_PAD: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Shares of closed pages in log2 units, the largest of a slot's heads.

    Slots are those of ``select_kernels``; row m of a matrix tile is head ``m % HEADS_PAD`` of slot
    ``m // HEADS_PAD`` of the program's. Writes the closed pages of (streams, tiles, SLOTS, capacity) float32.
    Grid: (tiles of this launch * blocks of slots, streams).
    """
    slot_blocks: tl.constexpr = (SLOTS + SLOTS_BLOCK - 1) // SLOTS_BLOCK
    rows: tl.constexpr = SLOTS_BLOCK * HEADS_PAD
    stream = tl.program_id(1).to(tl.int64)
    tile, first_slot = tl.program_id(0) // slot_blocks, tl.program_id(0) % slot_blocks * SLOTS_BLOCK
    q_first = (first_tile + tile) * TILE
    pages = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * (CHUNK // PAGE)
    m = tl.arange(0, rows)
    slot, head = first_slot + m // HEADS_PAD, m % HEADS_PAD
    position = q_first + slot * (TILE // SLOTS)
    live = (slot < SLOTS) & (head < HEADS) & (position + TILE // SLOTS > start) & (position < stop)
    # Where a call begins between two slots, its first row stands for the slot before it.
    position = tl.maximum(position, start)
    q_offset = head.to(tl.int64) * q_head + (position - start).to(tl.int64) * q_row
    q = load_rows(q_ptr + stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
    q, squares = score_factors(
        q, scale if CAP else tl.sqrt(scale), mean_weight_ptr, variance_weight_ptr, stream, 0,
        HEADS, HEADS_PAD, True, DIM, DIM_PAD, SPREAD, SPREAD_PAD,
    )  # fmt: skip
    cell = ((stream * tiles + tile) * SLOTS + slot) * HEADS + head
    total = tl.load(totals_ptr + cell, mask=live, other=float("inf"))
    base = features_ptr + stream * features_stream
    own_slot = first_slot + tl.arange(0, SLOTS_BLOCK)
    shares = shares_ptr + ((stream * tiles + tile) * SLOTS + own_slot) * capacity
    index = tl.arange(0, BLOCK_PAGES * BALLS_PAD)
    for block in range(0, pages, BLOCK_PAGES):
        ball_page = block + index // BALLS_PAD
        present = (ball_page < pages) & (index % BALLS_PAD < BALLS)
        ball = ball_page * BALLS + index % BALLS_PAD
        mean = load_rows(base, ball, features_row, present, DIM, DIM_PAD, True)
        spread = load_rows(base + DIM, ball, features_row, present, SPREAD, SPREAD_PAD, True)
        # Squares are rounded as in ``list_kernel``: pages close to the bar fall to the same side of it.
        inside, outside = (scale, 1.0) if CAP else (1.0, scale)
        along, across = ball_terms(q, squares, mean, spread, inside, softcap, CAP)
        scores = (along + across) * (outside * LOG2E) + LOG2_BALL
        if BALLS > 1:
            scores = sum_of_balls(scores, present, BLOCK_PAGES, BALLS_PAD)
        share = tl.reshape(scores - total[:, None], [SLOTS_BLOCK, HEADS_PAD, BLOCK_PAGES])
        page = block + tl.arange(0, BLOCK_PAGES)
        keep = (own_slot < SLOTS)[:, None] & (page < pages)[None, :]
        tl.store(shares[:, None] + page[None, :], tl.max(share, 1), mask=keep)
