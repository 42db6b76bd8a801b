"""The kernels of selection: lists of the balls or pages that rows open, and lists of what is under them.

Matrix tiles stand on their side here, balls down and rows across: what a ball asks of all rows is then
found within a few threads. Slots and rows are those of ``select_kernels``.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    ENTRY,
    LOG2E,
    closed_chunks,
    load_rows,
    score_factors,
    tanh,
)
from llama_surgery.attention.impl.triton.select_kernels import slots_of


@triton.jit
def _rows(
    block_id,
    head_block,
    q_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    q_stream,
    q_head,
    q_row,
    tiles,
    start,
    stop,
    first_tile,
    dense_until,
    scale,
    softcap,
    log2_bar,
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
    CAP: tl.constexpr,
):
    """What rows ask of balls: (dim, rows) queries, (dim or groups, rows) squares, bars and places (rows,).

    Without a cap everything is divided by the scale once, so that ``q·μ + (s·q²)·(α·½·σ²)`` is compared
    as it comes out of the matrix units; with one, squares carry s² and bars are logits.
    """
    stream = tl.program_id(1).to(tl.int64)
    tile, slot, head, position, live = slots_of(
        block_id, head_block, first_tile, tiles, start, stop,
        HEADS, HEADS_BLOCK, SLOTS, SLOTS_PAD, TILES_BLOCK, TILE,
    )  # fmt: skip
    q_offset = head.to(tl.int64) * q_head + (position - start).to(tl.int64) * q_row
    q = load_rows(q_ptr + stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
    q, squares = score_factors(
        q, scale if CAP else tl.sqrt(scale), mean_weight_ptr, variance_weight_ptr, stream,
        head_block * HEADS_BLOCK, HEADS, HEADS_BLOCK, True, DIM, DIM_PAD, SPREAD, SPREAD_PAD,
    )  # fmt: skip
    # Rows that are not there, or have nothing closed, open nothing.
    live = live & ((first_tile + tile) * TILE >= dense_until)
    cell = ((stream * tiles + tile) * SLOTS + slot) * HEADS + head
    bar = (tl.load(totals_ptr + cell, mask=live, other=float("inf")) + log2_bar) / LOG2E
    if not CAP:
        bar = bar / scale
    bar = tl.where(live, bar, float("inf"))
    return tl.trans(q), tl.trans(squares), bar, position - (first_tile + tile) * TILE


@triton.jit
def _above(
    queries,
    squares,
    bar,
    mean,
    spread,
    present,
    scale,
    softcap,
    LOG_BALL: tl.constexpr,
    PAGES: tl.constexpr,
    BALLS: tl.constexpr,
    BALLS_PAD: tl.constexpr,
    CAP: tl.constexpr,
):
    """(PAGES, rows) bool: does the log-sum-exp of a page's balls' scores exceed the row's bar."""
    if CAP:
        slope = tanh(tl.dot(mean, queries) * (scale / softcap))
        bend = 1.0 - slope * slope
        scores = slope * softcap + tl.dot(spread, squares) * bend * bend
        unit = 1.0
    else:
        scores = tl.dot(mean, queries)
        scores = tl.dot(spread, squares, scores)
        unit = scale
    bar = bar - LOG_BALL / unit
    if BALLS_PAD == 1:
        return scores > bar[None, :]
    else:
        weights = tl.exp2((scores - bar[None, :]) * (unit * LOG2E))
        if BALLS != BALLS_PAD:
            weights = tl.where(present[:, None], weights, 0.0)
        return tl.sum(tl.reshape(weights, [PAGES, BALLS_PAD, weights.shape[1]]), 1) > 1.0


@triton.jit(
    do_not_specialize=["tiles", "capacity", "start", "stop", "first_tile", "dense_until"],
)
def list_kernel(
    q_ptr,
    means,
    spreads,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    sink_page_ptr,
    entries_ptr,
    counts_ptr,
    seen_ptr,
    first_ptr,
    q_stream,
    q_head,
    q_row,
    tiles,
    capacity,
    start,
    stop,
    first_tile,
    dense_until,
    scale,
    softcap,
    log2_bar,
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
    PAGE: tl.constexpr,
    LOG_BALL: tl.constexpr,
    BALLS: tl.constexpr,
    BALLS_PAD: tl.constexpr,
    BLOCK_BALLS: tl.constexpr,
    CAP: tl.constexpr,
):
    """Score all closed pages against the rows' totals and list those that rows open.

    Writes, for every tile, its pages in ascending order, left-packed, as ``page * ENTRY + first_open``
    (streams, tiles, capacity) int32; their number (streams, tiles) int32; and how many of the tile's
    rows see each of them, summed (streams, tiles) int32. ``capacity`` is at least the number of closed
    pages of the launch's last tile, so that a list cannot overflow. Grid: (blocks of tiles, streams).
    With ``first_ptr`` (streams, tiles, capacity) uint8 also the first row of every closed page, TILE where
    none opened it. A *page* is any run of PAGE slots, ``log2_bar`` the log2 of the share that opens it.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    per_chunk: tl.constexpr = CHUNK // PAGE
    per_tile: tl.constexpr = SLOTS_PAD * HEADS_BLOCK
    block_pages: tl.constexpr = BLOCK_BALLS // BALLS_PAD
    stream = tl.program_id(1).to(tl.int64)
    block_id = tl.program_id(0)

    tile = block_id * TILES_BLOCK + tl.arange(0, TILES_BLOCK)
    q_first = (first_tile + tile) * TILE
    closed = closed_chunks(q_first, CHUNK, WINDOW, dense_until)
    closed = tl.where(tile < tiles, closed, 0)
    pages = closed * per_chunk
    # Rows of the tile that are given, counted from its anchor: low … high - 1.
    low = tl.maximum(start - q_first, 0)
    high = tl.minimum(stop - q_first, TILE)
    sink_page = tl.load(sink_page_ptr + stream)
    list_base = entries_ptr + (stream * tiles + tile.to(tl.int64)) * capacity
    count = tl.zeros([TILES_BLOCK], tl.int32)
    seen = tl.zeros([TILES_BLOCK], tl.int32)

    if head_blocks == 1:
        queries, squares, bar, row = _rows(
            block_id, 0, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr, q_stream, q_head, q_row,
            tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
            HEADS, HEADS_BLOCK, SLOTS, SLOTS_PAD, TILES_BLOCK, TILE, DIM, DIM_PAD,
            SPREAD, SPREAD_PAD, CAP,
        )  # fmt: skip

    last = tl.max(pages, 0)
    for block in range(0, last, block_pages):
        page = block + tl.arange(0, block_pages)
        index = tl.arange(0, BLOCK_BALLS)
        present = (block + index // BALLS_PAD < last) & (index % BALLS_PAD < BALLS)
        # What lies behind the last page may be anything: it is not listed.
        if BALLS == BALLS_PAD:
            mean = means.load([tl.program_id(1), block * BALLS, 0])
            spread = spreads.load([tl.program_id(1), block * BALLS, 0])
        else:
            mean = means.load([tl.program_id(1), block, 0, 0])
            spread = spreads.load([tl.program_id(1), block, 0, 0])
        mean, spread = mean.reshape(BLOCK_BALLS, DIM_PAD), spread.reshape(BLOCK_BALLS, SPREAD_PAD)
        first = tl.full([block_pages, TILES_BLOCK], TILE, tl.int32)
        for head_block in tl.static_range(head_blocks):
            if head_blocks > 1:
                queries, squares, bar, row = _rows(
                    block_id, head_block, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr,
                    q_stream, q_head, q_row,
                    tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
                    HEADS, HEADS_BLOCK, SLOTS, SLOTS_PAD, TILES_BLOCK, TILE, DIM, DIM_PAD,
                    SPREAD, SPREAD_PAD, CAP,
                )  # fmt: skip
            above = _above(
                queries, squares, bar, mean, spread, present, scale, softcap,
                LOG_BALL, block_pages, BALLS, BALLS_PAD, CAP,
            )  # fmt: skip
            opened = tl.where(above, row[None, :], TILE)
            opened = tl.reshape(opened, [block_pages, TILES_BLOCK, per_tile])
            first = tl.minimum(first, tl.min(opened, 2))
        first = tl.where((page == sink_page)[:, None], 0, first)
        if first_ptr is not None:
            table = first_ptr + (stream * tiles + tile.to(tl.int64)) * capacity
            closed_page = page[:, None] < pages[None, :]
            tl.store(table[None, :] + page[:, None], first.to(tl.uint8), mask=closed_page)
        listed = (first < TILE) & (page[:, None] < pages[None, :])
        rank = count[None, :] + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(list_base[None, :] + rank, page[:, None] * ENTRY + first, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
        rows_seen = tl.maximum(high[None, :] - tl.maximum(first, low[None, :]), 0)
        seen += tl.sum(tl.where(listed, rows_seen, 0), 0)

    cell = stream * tiles + tile
    tl.store(counts_ptr + cell, count, mask=tile < tiles)
    tl.store(seen_ptr + cell, seen, mask=tile < tiles)


@triton.jit(
    do_not_specialize=["tiles", "coarse_capacity", "capacity", "start", "stop", "first_tile", "dense_until"],
)
def descend_kernel(
    q_ptr,
    features_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    sink_page_ptr,
    coarse_ptr,
    coarse_counts_ptr,
    entries_ptr,
    counts_ptr,
    seen_ptr,
    q_stream,
    q_head,
    q_row,
    features_stream,
    features_row,
    tiles,
    coarse_capacity,
    capacity,
    start,
    stop,
    first_tile,
    dense_until,
    scale,
    softcap,
    log2_bar,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    LOG_BALL: tl.constexpr,
    FAN: tl.constexpr,
    FAN_PAD: tl.constexpr,
    BALLS: tl.constexpr,
    BALLS_PAD: tl.constexpr,
    BLOCK_BALLS: tl.constexpr,
    CAP: tl.constexpr,
):
    """List the pages under listed coarse balls, FAN each, that rows open; one program per tile and stream.

    A row opens a page only from the row on that listed the ball around it. ``coarse`` is a list as
    :func:`list_kernel` writes it, and so is what this writes.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    block_pages: tl.constexpr = BLOCK_BALLS // BALLS_PAD
    parents: tl.constexpr = block_pages // FAN_PAD
    stream = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    base = features_ptr + stream * features_stream
    q_first = (first_tile + tile) * TILE
    low = tl.maximum(start - q_first, 0)
    high = tl.minimum(stop - q_first, TILE)
    sink_page = tl.load(sink_page_ptr + stream)
    coarse = coarse_ptr + (stream * tiles + tile) * coarse_capacity
    coarse_count = tl.load(coarse_counts_ptr + stream * tiles + tile)
    entries = entries_ptr + (stream * tiles + tile) * capacity
    count = tl.full([], 0, tl.int32)
    seen = tl.full([], 0, tl.int32)

    if head_blocks == 1:
        queries, squares, bar, row = _rows(
            tile, 0, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr, q_stream, q_head, q_row,
            tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
            HEADS, HEADS_BLOCK, SLOTS, SLOTS_PAD, 1, TILE, DIM, DIM_PAD, SPREAD, SPREAD_PAD, CAP,
        )  # fmt: skip

    for place in range(0, coarse_count, parents):
        index = tl.arange(0, BLOCK_BALLS)
        at = place + index // (BALLS_PAD * FAN_PAD)
        of_parent = index // BALLS_PAD % FAN_PAD
        present = (at < coarse_count) & (of_parent < FAN) & (index % BALLS_PAD < BALLS)
        entry = tl.load(coarse + at, mask=at < coarse_count, other=0)
        ball = (entry // ENTRY * FAN + of_parent) * BALLS + index % BALLS_PAD
        mean = load_rows(base, ball, features_row, present, DIM, DIM_PAD, True)
        spread = load_rows(base + DIM, ball, features_row, present, SPREAD, SPREAD_PAD, True)
        index = tl.arange(0, block_pages)
        at = place + index // FAN_PAD
        entry = tl.load(coarse + at, mask=at < coarse_count, other=0)
        page = entry // ENTRY * FAN + index % FAN_PAD
        since = entry % ENTRY
        first = tl.full([block_pages], TILE, tl.int32)
        for head_block in tl.static_range(head_blocks):
            if head_blocks > 1:
                queries, squares, bar, row = _rows(
                    tile, head_block, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr,
                    q_stream, q_head, q_row,
                    tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
                    HEADS, HEADS_BLOCK, SLOTS, SLOTS_PAD, 1, TILE, DIM, DIM_PAD, SPREAD, SPREAD_PAD, CAP,
                )  # fmt: skip
            above = _above(
                queries, squares, bar, mean, spread, present, scale, softcap,
                LOG_BALL, block_pages, BALLS, BALLS_PAD, CAP,
            )  # fmt: skip
            opened = tl.where(above & (row[None, :] >= since[:, None]), row[None, :], TILE)
            first = tl.minimum(first, tl.min(opened, 1))
        first = tl.where(page == sink_page, 0, first)
        listed = (first < TILE) & (at < coarse_count) & (index % FAN_PAD < FAN)
        rank = count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(entries + rank, page * ENTRY + first, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
        rows_seen = tl.maximum(high - tl.maximum(first, low), 0)
        seen += tl.sum(tl.where(listed, rows_seen, 0), 0)

    tl.store(counts_ptr + stream * tiles + tile, count)
    tl.store(seen_ptr + stream * tiles + tile, seen)
