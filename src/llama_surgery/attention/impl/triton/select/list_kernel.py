"""The second kernel of selection: lists of the pages that rows open.

Matrix tiles stand on their side here, pages down and rows across: what a page asks of all rows is then
found within a few threads. Rows are those of ``select_kernels``.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    ENTRY,
    closed_chunks,
    load_rows,
    tanh,
)
from llama_surgery.attention.impl.triton.select.page_scores import page_scores, score_factors
from llama_surgery.attention.impl.triton.select.totals_kernel import rows_of_tiles


@triton.jit
def _rows(
    block_id,
    head_block,
    q_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    totals_ptr,
    q_chooser,
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
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    CAP: tl.constexpr,
):
    """What rows ask of pages: (dim, rows) queries, (dim or groups, rows) squares, bars and places (rows,).

    Squares carry the scale once, to be multiplied by it after the product as q·μ is; with a cap, twice.
    Bars are scores in log2 units.
    """
    chooser = tl.program_id(1).to(tl.int64)
    tile, head, position, live = rows_of_tiles(
        block_id, head_block, first_tile, tiles, start, stop,
        HEADS, HEADS_BLOCK, TILES_BLOCK, TILE, TILE_PAD,
    )  # fmt: skip
    q_offset = head.to(tl.int64) * q_head + (position - start).to(tl.int64) * q_row
    q = load_rows(q_ptr + chooser * q_chooser, q_offset, 1, live, DIM, DIM_PAD, True)
    q, squares = score_factors(
        q, scale if CAP else tl.sqrt(scale), mean_weight_ptr, variance_weight_ptr, chooser,
        head_block * HEADS_BLOCK, HEADS, HEADS_BLOCK, True, DIM, DIM_PAD, SPREAD, SPREAD_PAD,
    )  # fmt: skip
    # Rows that are not there, or have nothing closed, open nothing.
    live = live & ((first_tile + tile) * TILE >= dense_until)
    cell = ((chooser * tiles + tile) * TILE + position - (first_tile + tile) * TILE) * HEADS + head
    bar = tl.load(totals_ptr + cell, mask=live, other=float("inf")) + log2_bar
    bar = tl.where(live, bar, float("inf"))
    return tl.trans(q), tl.trans(squares), bar, position - (first_tile + tile) * TILE


@triton.jit
def _above(queries, squares, bar, mean, spread, scale, softcap, LOG2_PAGE: tl.constexpr, CAP: tl.constexpr):
    """(pages, rows) bool: does a page's score exceed the row's bar."""
    along = tl.dot(mean, queries)
    if CAP:
        slope = tanh(along * (scale / softcap))
        bend = 1.0 - slope * slope
        scores = page_scores(slope * softcap, tl.dot(spread, squares) * bend * bend, LOG2_PAGE)
    else:
        scores = page_scores(along * scale, tl.dot(spread, squares) * scale, LOG2_PAGE)
    return scores > bar[None, :]


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
    q_chooser,
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
    BLOCK_PAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Score all closed pages against the rows' totals and list those that rows open.

    Writes, for every tile, its pages in ascending order, left-packed, as ``page * ENTRY + first_open``
    (choosers, tiles, capacity) int32; their number (choosers, tiles) int32; and how many of the tile's
    rows see each of them, summed (choosers, tiles) int32. ``capacity`` is at least the number of closed
    pages of the launch's last tile, so that a list cannot overflow. Grid: (blocks of tiles, choosers),
    GROUP choosers to a stream. With ``first_ptr`` (choosers, tiles, capacity) uint8 also the first row of
    every closed page, TILE where none opened it. ``log2_bar`` is the log2 of the share that opens a page.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    per_chunk: tl.constexpr = CHUNK // PAGE
    per_tile: tl.constexpr = TILE_PAD * HEADS_BLOCK
    chooser = tl.program_id(1).to(tl.int64)
    stream = tl.program_id(1) // GROUP
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
    list_base = entries_ptr + (chooser * tiles + tile.to(tl.int64)) * capacity
    count = tl.zeros([TILES_BLOCK], tl.int32)
    seen = tl.zeros([TILES_BLOCK], tl.int32)

    if head_blocks == 1:
        queries, squares, bar, row = _rows(
            block_id, 0, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr, q_chooser, q_head, q_row,
            tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
            HEADS, HEADS_BLOCK, TILES_BLOCK, TILE, TILE_PAD, DIM, DIM_PAD,
            SPREAD, SPREAD_PAD, CAP,
        )  # fmt: skip

    last = tl.max(pages, 0)
    for block in range(0, last, BLOCK_PAGES):
        page = block + tl.arange(0, BLOCK_PAGES)
        # What lies behind the last page may be anything: it is not listed.
        mean = means.load([stream, block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
        spread = spreads.load([stream, block, 0]).reshape(BLOCK_PAGES, SPREAD_PAD)
        first = tl.full([BLOCK_PAGES, TILES_BLOCK], TILE, tl.int32)
        for head_block in tl.static_range(head_blocks):
            if head_blocks > 1:
                queries, squares, bar, row = _rows(
                    block_id, head_block, q_ptr, mean_weight_ptr, variance_weight_ptr, totals_ptr,
                    q_chooser, q_head, q_row,
                    tiles, start, stop, first_tile, dense_until, scale, softcap, log2_bar,
                    HEADS, HEADS_BLOCK, TILES_BLOCK, TILE, TILE_PAD, DIM, DIM_PAD,
                    SPREAD, SPREAD_PAD, CAP,
                )  # fmt: skip
            above = _above(queries, squares, bar, mean, spread, scale, softcap, LOG2_PAGE, CAP)
            opened = tl.where(above, row[None, :], TILE)
            opened = tl.reshape(opened, [BLOCK_PAGES, TILES_BLOCK, per_tile])
            first = tl.minimum(first, tl.min(opened, 2))
        first = tl.where((page == sink_page)[:, None], 0, first)
        if first_ptr is not None:
            table = first_ptr + (chooser * tiles + tile.to(tl.int64)) * capacity
            closed_page = page[:, None] < pages[None, :]
            tl.store(table[None, :] + page[:, None], first.to(tl.uint8), mask=closed_page)
        listed = (first < TILE) & (page[:, None] < pages[None, :])
        rank = count[None, :] + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(list_base[None, :] + rank, page[:, None] * ENTRY + first, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
        rows_seen = tl.maximum(high[None, :] - tl.maximum(first, low[None, :]), 0)
        seen += tl.sum(tl.where(listed, rows_seen, 0), 0)

    cell = chooser * tiles + tile
    tl.store(counts_ptr + cell, count, mask=tile < tiles)
    tl.store(seen_ptr + cell, seen, mask=tile < tiles)
