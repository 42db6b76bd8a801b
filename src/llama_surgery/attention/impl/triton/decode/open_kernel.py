"""The second kernel of decode: open pages and attend to them. See ``score_kernels`` for rows."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.decode.append_kernel import block_of
from llama_surgery.attention.impl.triton.decode.score_kernels import rows_of, store_part
from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LOG2E,
    bar_at,
    cap_logits,
    closed_chunks,
    load_rows,
    softmax_step,
)

#: Pages whose opening one word of bits holds.
WORD = tl.constexpr(32)


@triton.jit
def open_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    whole_ptr,
    table_ptr,
    sink_page_ptr,
    sink_ptr,
    offset_ptr,
    means_ptr,
    scores_ptr,
    weights_ptr,
    sums_ptr,
    part_out_ptr,
    part_lse_ptr,
    counts_ptr,
    q_stream,
    q_head,
    q_row,
    k_sequence,
    k_head,
    k_block,
    k_row,
    v_sequence,
    v_head,
    v_block,
    v_row,
    table_row,
    sink_page_sequence,
    sink_page_head,
    sink_page_block,
    means_sequence,
    means_head,
    means_block,
    means_row,
    capacity,
    splits,
    far_splits,
    dense_until,
    scale,
    softcap,
    log2_bar,
    log2_from,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SUMMARY: tl.constexpr,
    BLOCK_MEANS: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Open pages by their shares and attend to them; every program takes each ``far_splits``-th page.

    With SUMMARY one key stands in for each page that a query does not see, with the logit that the first
    kernel left in ``weights`` and its mean value, of ``means`` (sequences, KV_HEADS, blocks, CHUNK // PAGE,
    VALUE_DIM). A program takes them for the pages that it looks through.
    Grid: (far_splits, streams * blocks of queries). Writes partial results behind those of the first
    ``splits`` programs, and counts (streams, far_splits, queries, 2) int32: pages that the query opened,
    and pages that its program read. ``offset_ptr`` (KV_HEADS, HEADS) float32, or None, is added to log θ.
    """
    stream, first, length, dense_until, row, head, closed, live = rows_of(
        lengths_ptr, whole_ptr, capacity, dense_until,
        KV_HEADS, HEADS, HEADS_PAD, ROWS, ROWS_PAD, ROWS_BLOCK, CHUNK, WINDOW,
    )  # fmt: skip
    sequence, kv_head = stream // KV_HEADS, stream % KV_HEADS
    entry = sequence * table_row
    rows: tl.constexpr = ROWS_PAD * HEADS_PAD
    per_chunk: tl.constexpr = CHUNK // PAGE
    split = tl.program_id(0)
    pages = tl.max(closed, 0) * per_chunk
    part = ((stream * (splits + far_splits) + splits + split) * ROWS + row) * HEADS + head
    query = tl.arange(0, ROWS_PAD)
    is_query = (query < ROWS_BLOCK) & (first + query < ROWS)
    opened_pages = tl.zeros([ROWS_PAD], tl.int32)
    read_pages = tl.zeros([ROWS_PAD], tl.int32)
    top = tl.full([rows], FLOOR, tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, VALUE_PAD], tl.float32)
    if split < pages:
        # What waits for nothing but the length is asked for first.
        place = tl.arange(0, WORD)
        scores_base = scores_ptr + stream * (capacity // PAGE) * ROWS * HEADS
        page = split + place * far_splits
        score = _scores_of(scores_base, page, pages, row, head, live, HEADS, ROWS)
        blocks = _blocks_of(table_ptr, entry, page, pages, per_chunk, PAGED)
        q_offset = head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
        q = load_rows(q_ptr + stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
        sink_page_ptr += sequence * sink_page_sequence + kv_head * sink_page_head
        sink_page = tl.load(sink_page_ptr + block_of(table_ptr, entry, 0, PAGED) * sink_page_block)
        row_total = _row_totals(
            sums_ptr, part_lse_ptr, sink_ptr, stream, row, head, live, splits, far_splits,
            HEADS, ROWS, SPLITS_PAD, SINK,
        )  # fmt: skip
        if offset_ptr is not None:
            row_total += tl.load(offset_ptr + kv_head * HEADS + head, mask=live, other=0.0) * LOG2E
        factor = scale * LOG2E
        if CAP:
            factor = 1.0
        k_base = k_ptr + sequence * k_sequence + kv_head * k_head
        v_base = v_ptr + sequence * v_sequence + kv_head * v_head
        if SUMMARY:
            weights_base = weights_ptr + stream * (capacity // PAGE) * ROWS * HEADS
            means_base = means_ptr + sequence * means_sequence + kv_head * means_head
        far = closed_chunks(length + first + query, CHUNK, WINDOW, dense_until) * per_chunk
        far = tl.where(is_query & (length + first + query < capacity), far, 0)
        bar = bar_at(length + first + query, log2_bar, log2_from)
        bit = tl.full([WORD], 1, tl.int64) << place.to(tl.int64)
        pieces: tl.constexpr = (PAGE + BLOCK_KEYS - 1) // BLOCK_KEYS
        mine = (pages - split + far_splits - 1) // far_splits
        for word in range(0, mine, WORD):
            share = tl.reshape(score - row_total[None, :], [WORD, ROWS_PAD, HEADS_PAD])
            opened = (tl.max(share, 2) > bar[None, :]) | (page == sink_page)[:, None]
            opened = (opened & (page[:, None] < far[None, :])).to(tl.int64)
            some = tl.max(opened, 1)
            count = tl.sum(some, 0).to(tl.int32)
            opened_pages += tl.sum(opened, 0).to(tl.int32)
            read_pages += count
            bits = tl.sum(some * bit, 0)
            row_bits = tl.sum(opened * bit[:, None], 0)
            row_bits = tl.reshape(tl.broadcast_to(row_bits[:, None], [ROWS_PAD, HEADS_PAD]), [rows])
            if SUMMARY:
                for first_at in range(0, tl.minimum(mine - word, WORD), BLOCK_MEANS):
                    at = first_at + tl.arange(0, BLOCK_MEANS)
                    at_page = split + (word + at) * far_splits
                    real = at_page < pages
                    block = block_of(table_ptr, entry, tl.minimum(at_page, pages - 1) // per_chunk, PAGED)
                    cells = block * means_block + (at_page % per_chunk).to(tl.int64) * means_row
                    v = load_rows(means_base, cells, 1, real, VALUE_DIM, VALUE_PAD, True)
                    opened_here = ((row_bits[:, None] >> at.to(tl.int64)[None, :]) & 1) == 1
                    hidden = (at_page[None, :] < (closed * per_chunk)[:, None]) & ~opened_here
                    cells = (at_page[None, :] * ROWS + row[:, None]) * HEADS + head[:, None]
                    logits = tl.load(weights_base + cells, mask=hidden, other=float("-inf"))
                    acc, total, top = softmax_step(acc, total, top, logits, 1.0, v, live, False)
            for step in range(0, count * pieces):
                lowest = bits & (-bits)
                # A power of two as a float is its exponent.
                at = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                piece = step % pieces
                bits = tl.where(piece == pieces - 1, bits ^ lowest, bits)
                within = piece * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
                at_page = split + (word + at) * far_splits
                if PAGED:  # not looked up here: loads of keys would wait for that
                    block = tl.sum(tl.where(place == at, blocks, 0), 0).to(tl.int64)
                else:
                    block = (at_page // per_chunk).to(tl.int64)
                slot = (at_page % per_chunk * PAGE + within).to(tl.int64)
                k_cells, v_cells = block * k_block + slot * k_row, block * v_block + slot * v_row
                partial: tl.constexpr = PAGE % BLOCK_KEYS != 0
                k = load_rows(k_base, k_cells, 1, within < PAGE, DIM, DIM_PAD, partial)
                v = load_rows(v_base, v_cells, 1, within < PAGE, VALUE_DIM, VALUE_PAD, partial)
                products = tl.dot(q, tl.trans(k))
                products = cap_logits(products, scale, softcap, CAP)
                if PAGE % BLOCK_KEYS != 0:
                    products = tl.where((within < PAGE)[None, :], products, float("-inf"))
                sees = ((row_bits >> at.to(tl.int64)) & 1) == 1
                acc, total, top = softmax_step(
                    acc, total, top, products, factor, v, sees, ROWS_BLOCK > 1
                )  # fmt: skip
            page = split + (word + WORD + place) * far_splits
            score = _scores_of(scores_base, page, pages, row, head, live, HEADS, ROWS)
            blocks = _blocks_of(table_ptr, entry, page, pages, per_chunk, PAGED)
    seen = (tl.max(read_pages, 0) > 0) | SUMMARY
    store_part(part_out_ptr, part_lse_ptr, part, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD)
    counted = ((stream * far_splits + split) * ROWS + first + query) * 2
    tl.store(counts_ptr + counted, opened_pages, mask=is_query)
    tl.store(counts_ptr + counted + 1, read_pages, mask=is_query)


@triton.jit
def _scores_of(base, page, pages, row, head, live, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Scores (pages, rows) that the first kernel left, -inf beyond the closed pages."""
    cells = base + (page[:, None] * ROWS + row[None, :]) * HEADS + head[None, :]
    return tl.load(cells, mask=live[None, :] & (page < pages)[:, None], other=float("-inf"))


@triton.jit
def _blocks_of(table_ptr, entry, page, pages, per_chunk: tl.constexpr, PAGED: tl.constexpr):
    """Blocks, as int32, that hold pages, of the last closed one beyond these. Without a table nobody asks."""
    chunk = tl.minimum(page, pages - 1) // per_chunk
    return tl.load(table_ptr + entry + chunk) if PAGED else chunk


@triton.jit
def _row_totals(
    sums_ptr,
    part_lse_ptr,
    sink_ptr,
    stream,
    row,
    head,
    live,
    splits,
    far_splits,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SINK: tl.constexpr,
):
    """Log-sum-exp of rows as selection sees them: near field, scores of closed pages, attention sink."""
    index = tl.arange(0, SPLITS_PAD)[:, None]
    there = (index < splits) & live[None, :]
    scored_cell = ((stream * splits + index) * ROWS + row[None, :]) * HEADS + head[None, :]
    near_cell = ((stream * (splits + far_splits) + index) * ROWS + row[None, :]) * HEADS + head[None, :]
    scored = tl.load(sums_ptr + scored_cell, mask=there, other=float("-inf"))
    near = tl.load(part_lse_ptr + near_cell, mask=there, other=float("-inf"))
    peak = tl.maximum(tl.maximum(tl.max(scored, 0), tl.max(near, 0)), FLOOR)
    if SINK:
        sink = tl.load(sink_ptr + stream * HEADS + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(tl.exp2(scored - peak[None, :]), 0) + tl.sum(tl.exp2(near - peak[None, :]), 0)
    if SINK:
        total += tl.exp2(sink - peak)
    return peak + tl.log2(tl.where(live, total, 1.0))
