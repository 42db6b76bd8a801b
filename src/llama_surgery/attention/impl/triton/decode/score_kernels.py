"""The first kernel of decode: near field and page scores.

Row m of a matrix tile is head ``m % HEADS_PAD`` of query ``m // HEADS_PAD`` of the program's ROWS_BLOCK
queries. Query r of a stream is at position ``length + r`` and is a tile of its own. Grids follow from the
cache's capacity; what a program does follows from the length it reads, so that a launch can be captured.

How a cache lies is said in append_kernel.py. A row beyond the cache's capacity, whose key is nowhere,
gets NaN: the host, which knows the lengths, should have refused it, and an answer would be a wrong one.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.decode.append_kernel import block_of
from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LOG2E,
    cap_logits,
    closed_chunks,
    load_rows,
    softmax_step,
    sum_step,
)
from llama_surgery.attention.impl.triton.select.page_scores import page_scores, page_terms, score_factors

#: Blocks of a table that are looked up at once, at least.
LOOKUP = tl.constexpr(128)


@triton.jit
def rows_of(
    lengths_ptr,
    whole_ptr,
    capacity,
    dense_until,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Stream, first query, length, and the position below which the sequence sees everything; per row of the
    tile: query, head, closed chunks, is it real.

    Rows beyond the capacity have no closed chunks, so that none are looked for that do not exist.
    """
    blocks: tl.constexpr = (ROWS + ROWS_BLOCK - 1) // ROWS_BLOCK
    stream = (tl.program_id(1) // blocks).to(tl.int64)
    first = (tl.program_id(1) % blocks) * ROWS_BLOCK
    length = tl.load(lengths_ptr + stream // KV_HEADS)
    if whole_ptr is not None:
        dense_until = tl.where(tl.load(whole_ptr + stream // KV_HEADS) != 0, capacity, dense_until)
    m = tl.arange(0, ROWS_PAD * HEADS_PAD)
    row, head = first + m // HEADS_PAD, m % HEADS_PAD
    live = (m // HEADS_PAD < ROWS_BLOCK) & (row < ROWS) & (head < HEADS)
    closed = closed_chunks(length + row, CHUNK, WINDOW, dense_until)
    closed = tl.where(live & (length + row < capacity), closed, 0)
    return stream, first, length, dense_until, row, head, closed, live


@triton.jit
def store_part(out_ptr, lse_ptr, cell, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD: tl.constexpr):
    """Write a partial result: (…, VALUE_DIM) float32 and its log-sum-exp in log2 units, -inf without keys.

    Outputs are written only where keys were ``seen``: who merges looks at the log-sum-exp first.
    """
    some = total > 0.0
    filled = tl.where(some, total, 1.0)
    tl.store(lse_ptr + cell, tl.where(some, top + tl.log2(filled), float("-inf")), mask=live)
    if seen:
        column = tl.arange(0, VALUE_PAD)
        cells = out_ptr + cell.to(tl.int64)[:, None] * VALUE_DIM + column[None, :]
        tl.store(cells, acc / filled[:, None], mask=live[:, None] & (column < VALUE_DIM)[None, :])


@triton.jit
def score_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    feature_ptr,
    mean_weight_ptr,
    variance_weight_ptr,
    summary_ptr,
    lengths_ptr,
    whole_ptr,
    table_ptr,
    scores_ptr,
    weights_ptr,
    sums_ptr,
    part_out_ptr,
    part_lse_ptr,
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
    feature_sequence,
    feature_head,
    feature_block,
    feature_row,
    capacity,
    splits,
    parts,
    dense_until,
    scale,
    softcap,
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
    LOG2_PAGE: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    SUMMARY: tl.constexpr,
    CAP: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Near field and page scores, cut into steps that are dealt to ``splits`` programs.

    Grid: (splits, streams * blocks of queries). Features of a page are μ and ½·σ², side by side. Weights of
    channels, (KV_HEADS * HEADS, DIM) float32 or None, are those of ``score_factors``. Writes, all float32 in
    log2 units: scores (streams, pages, queries, heads); sums (streams, splits, queries, heads), the program's
    log-sum-exp of what pages weigh; and the near field's partial results (streams, parts, queries, heads[,
    VALUE_DIM]). With SUMMARY, where mean values stand in for pages that a query does not see, also their
    logits, weights shaped as scores: what pages weigh, to which ``summary_ptr`` (KV_HEADS, HEADS) is added if
    not None.
    """
    stream, _, length, _, row, head, closed, live = rows_of(
        lengths_ptr, whole_ptr, capacity, dense_until,
        KV_HEADS, HEADS, HEADS_PAD, ROWS, ROWS_PAD, ROWS_BLOCK, CHUNK, WINDOW,
    )  # fmt: skip
    sequence, kv_head = stream // KV_HEADS, stream % KV_HEADS
    entry = sequence * table_row
    rows: tl.constexpr = ROWS_PAD * HEADS_PAD
    per_chunk: tl.constexpr = CHUNK // PAGE
    split = tl.program_id(0)
    most = tl.max(closed, 0)
    begin = tl.min(tl.where(live, closed, most), 0) * CHUNK
    end = tl.minimum(tl.max(tl.where(live, length + row, -1), 0) + 1, capacity)
    pages = most * per_chunk
    near_steps = (end - begin + BLOCK_NEAR - 1) // BLOCK_NEAR
    steps = near_steps + (pages + BLOCK_PAGES - 1) // BLOCK_PAGES
    first_step = split * steps // splits
    last_step = (split + 1) * steps // splits
    cell = ((stream * splits + split) * ROWS + row) * HEADS + head
    part = ((stream * parts + split) * ROWS + row) * HEADS + head

    q_offset = head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
    q = load_rows(q_ptr + stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
    top = tl.full([rows], FLOOR, tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, VALUE_PAD], tl.float32)
    factor = scale * LOG2E
    if CAP:
        factor = 1.0
    k_base = k_ptr + sequence * k_sequence + kv_head * k_head
    v_base = v_ptr + sequence * v_sequence + kv_head * v_head
    near_last = tl.minimum(last_step, near_steps)
    for step in range(first_step, near_last):
        # Keys of the open chunk, this call's own among them, lie in order of position; all others
        # precede the queries. So a slot's number says whether a query may see it.
        first_key = begin + step * BLOCK_NEAR
        key = first_key + tl.arange(0, BLOCK_NEAR)
        chunk = first_key // CHUNK if CHUNK % BLOCK_NEAR == 0 else tl.minimum(key, end - 1) // CHUNK
        block = block_of(table_ptr, entry, chunk, PAGED)
        slot = (key % CHUNK).to(tl.int64)
        k_cells, v_cells = block * k_block + slot * k_row, block * v_block + slot * v_row
        k = load_rows(k_base, k_cells, 1, key < end, DIM, DIM_PAD, True)
        v = load_rows(v_base, v_cells, 1, key < end, VALUE_DIM, VALUE_PAD, True)
        products = tl.dot(q, tl.trans(k))
        products = cap_logits(products, scale, softcap, CAP)
        visible = (key[None, :] >= (closed * CHUNK)[:, None]) & (key[None, :] <= (length + row)[:, None])
        products = tl.where(visible, products, float("-inf"))
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)
    seen = near_last > first_step
    top = tl.where(length + row < capacity, top, float("nan"))
    store_part(part_out_ptr, part_lse_ptr, part, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD)

    if feature_ptr is not None:
        top = tl.full([rows], FLOOR, tl.float32)
        total = tl.zeros([rows], tl.float32)
        q, squares = score_factors(
            q, scale, mean_weight_ptr, variance_weight_ptr, kv_head, 0, HEADS, HEADS_PAD, True,
            DIM, DIM_PAD,
        )  # fmt: skip
        features = feature_ptr + sequence * feature_sequence + kv_head * feature_head
        scores_base = scores_ptr + stream * (capacity // PAGE) * ROWS * HEADS
        if SUMMARY:
            weights_base = weights_ptr + stream * (capacity // PAGE) * ROWS * HEADS
            if summary_ptr is not None:
                learned = tl.load(summary_ptr + kv_head * HEADS + head, mask=live, other=0.0) * LOG2E
        # With a table, steps whose blocks are looked up together: loads of features would wait for a lookup.
        at_once: tl.constexpr = LOOKUP if 2 * BLOCK_PAGES < LOOKUP else 2 * BLOCK_PAGES
        group: tl.constexpr = (at_once - 1) * per_chunk // BLOCK_PAGES if PAGED else 1 << 30
        for first in range(tl.maximum(first_step, near_steps) - near_steps, last_step - near_steps, group):
            if PAGED:
                first_chunk = first * BLOCK_PAGES // per_chunk
                looked_up = tl.minimum(first_chunk + tl.arange(0, at_once), (pages - 1) // per_chunk)
                blocks = tl.load(table_ptr + entry + looked_up)
            for step in range(first, tl.minimum(first + group, last_step - near_steps)):
                page = step * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
                present = page < pages
                far_chunk = tl.minimum(page, pages - 1) // per_chunk
                block = (tl.gather(blocks, far_chunk - first_chunk, 0) if PAGED else far_chunk).to(tl.int64)
                cells = block * feature_block + (page % per_chunk).to(tl.int64) * feature_row
                mean = load_rows(features, cells, 1, present, DIM, DIM_PAD, True)
                spread = load_rows(features + DIM, cells, 1, present, DIM, DIM_PAD, True)
                along, across = page_terms(q, squares, mean, spread, scale, softcap, CAP)
                cells = (page[None, :] * ROWS + row[:, None]) * HEADS + head[:, None]
                kept = live[:, None] & present[None, :]
                scores, weights = page_scores(along, across, LOG2_PAGE)
                tl.store(scores_base + cells, scores, mask=kept)
                if SUMMARY:
                    standing = weights
                    if summary_ptr is not None:
                        standing += learned[:, None]
                    tl.store(weights_base + cells, standing, mask=kept)
                far = page[None, :] < (closed * per_chunk)[:, None]
                total, top = sum_step(total, top, tl.where(far, weights, float("-inf")))
        some = total > 0.0
        summed = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(sums_ptr + cell, summed, mask=live)
