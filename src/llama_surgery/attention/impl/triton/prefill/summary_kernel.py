"""The kernel that lets one key each stand in for the pages that a row does not see."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LN2,
    LOG2E,
    closed_chunks,
    load_rows,
    softmax_step,
)
from llama_surgery.attention.impl.triton.select.page_scores import (
    page_terms,
    page_weights,
    score_factors,
)


@triton.jit(do_not_specialize=["tiles", "capacity", "start", "stop", "first_tile", "dense_until"])
def summary_kernel(
    q_ptr,
    means,
    spreads,
    values,
    first_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    weight_ptr,
    out_ptr,
    lse_ptr,
    q_chooser,
    q_head,
    q_row,
    out_chooser,
    out_head,
    out_row,
    lse_chooser,
    lse_head,
    tiles,
    capacity,
    start,
    stop,
    first_tile,
    dense_until,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TILE_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    LOG2_PAGE: tl.constexpr,
    CAP: tl.constexpr,
):
    """Add what a tile's rows do not see to their attention, page by page.

    A page's logit is that of ``page_weights``, its value the mean of its keys' values. ``first_ptr``
    (choosers, tiles, capacity) uint8 holds the first row of the tile that opened each page, TILE where none
    did. ``weight_ptr`` (choosers, HEADS) float32, if not None, is added to a head's logits; weights of
    channels are those of ``score_factors``. Rows are those of ``attend_kernel``, whose ``out`` and ``lse``
    are read and written. Grid: (tiles of this launch * blocks of heads, choosers).
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    rows: tl.constexpr = TILE_PAD * HEADS_BLOCK
    tile = tl.program_id(0) // head_blocks
    chooser = tl.program_id(1)
    wide_chooser = chooser.to(tl.int64)
    stream = chooser // GROUP
    m = tl.arange(0, rows)
    row = m % TILE_PAD
    head = (tl.program_id(0) % head_blocks) * HEADS_BLOCK + m // TILE_PAD
    q_first = (first_tile + tile) * TILE
    position = q_first + row
    live = (row < TILE) & (head < HEADS) & (position >= start) & (position < stop)
    pages = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * (CHUNK // PAGE)
    if pages > 0:
        local = (position - start).to(tl.int64)
        q_offset = head.to(tl.int64) * q_head + local * q_row
        q = load_rows(q_ptr + wide_chooser * q_chooser, q_offset, 1, live, DIM, DIM_PAD, True)
        q, squares = score_factors(
            q, scale, mean_weight_ptr, variance_weight_ptr, chooser,
            tl.program_id(0) % head_blocks * HEADS_BLOCK, HEADS, HEADS_BLOCK, False,
            DIM, DIM_PAD, SPREAD, SPREAD_PAD,
        )  # fmt: skip
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + chooser * HEADS + head, mask=live, other=0.0)
        first_base = first_ptr + (wide_chooser * tiles + tile) * capacity
        top = tl.full([rows], FLOOR, tl.float32)
        total = tl.zeros([rows], tl.float32)
        acc = tl.zeros([rows, VALUE_PAD], tl.float32)
        for block in range(0, pages, BLOCK_PAGES):
            mean = means.load([stream, block, 0]).reshape(BLOCK_PAGES, DIM_PAD)
            spread = spreads.load([stream, block, 0]).reshape(BLOCK_PAGES, SPREAD_PAD)
            along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
            logits = page_weights(along, across, LOG2_PAGE)
            if weight_ptr is not None:
                logits += (weight * LOG2E)[:, None]
            page = block + tl.arange(0, BLOCK_PAGES)
            first = tl.load(first_base + page, mask=page < pages, other=0).to(tl.int32)
            v = values.load([stream, block, 0]).reshape(BLOCK_PAGES, VALUE_PAD)
            logits = tl.where(row[:, None] >= first[None, :], float("-inf"), logits)
            acc, total, top = softmax_step(acc, total, top, logits, 1.0, v, live, False)

        column = tl.arange(0, VALUE_PAD)
        out_offset = wide_chooser * out_chooser + head.to(tl.int64) * out_head + local * out_row
        cells = out_ptr + out_offset[:, None] + column[None, :]
        keep = live[:, None] & (column < VALUE_DIM)[None, :]
        lse_cells = lse_ptr + wide_chooser * lse_chooser + head.to(tl.int64) * lse_head + local
        seen = tl.load(lse_cells, mask=live, other=0.0) * LOG2E
        seen_out = tl.load(cells, mask=keep, other=0.0).to(tl.float32)
        new_top = tl.maximum(top, seen)
        share, rest = tl.exp2(seen - new_top), tl.exp2(top - new_top)
        whole = share + total * rest
        out = (seen_out * share[:, None] + acc * rest[:, None]) / whole[:, None]
        tl.store(cells, out.to(out_ptr.dtype.element_ty), mask=keep)
        tl.store(lse_cells, (new_top + tl.log2(whole)) * LN2, mask=live)
