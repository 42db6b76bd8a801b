"""The kernels of decode: near field and page scores, opened pages, merge.

Row m of a matrix tile is head ``m % HEADS_PAD`` of query ``m // HEADS_PAD`` of the program's ROWS_BLOCK
queries. Query r of a stream is at position ``length + r`` and is a tile of its own. Grids follow from the
cache's capacity; what a program does follows from the length it reads, so that a launch can be captured.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    EXACT,
    FLOOR,
    LN2,
    LOG2E,
    ball_scores,
    cap_logits,
    closed_chunks,
    load_rows,
    scaled_squares,
    softmax_step,
    sum_step,
)

#: Pages whose opening one word of bits holds.
WORD = tl.constexpr(32)


@triton.jit
def append_kernel(
    new_k_ptr,
    new_v_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    new_k_stream,
    new_k_row,
    new_v_stream,
    new_v_row,
    k_stream,
    k_row,
    v_stream,
    v_row,
    capacity,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Write ROWS new keys and values behind the cached ones. Grid: (streams,)."""
    stream = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS_PAD)
    slot = tl.load(lengths_ptr + stream // KV_HEADS) + row
    present = (row < ROWS) & (slot < capacity)
    k = load_rows(new_k_ptr + stream * new_k_stream, row, new_k_row, present, DIM, DIM_PAD, True)
    v = load_rows(new_v_ptr + stream * new_v_stream, row, new_v_row, present, VALUE_DIM, VALUE_PAD, True)
    column, value_column = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    slot = slot.to(tl.int64)[:, None]
    k_cells = k_ptr + stream * k_stream + slot * k_row + column[None, :]
    v_cells = v_ptr + stream * v_stream + slot * v_row + value_column[None, :]
    tl.store(k_cells, k, mask=present[:, None] & (column < DIM)[None, :])
    tl.store(v_cells, v, mask=present[:, None] & (value_column < VALUE_DIM)[None, :])


@triton.jit
def _rows_of(
    lengths_ptr,
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
    """Stream, first query, length; per row of the tile: query, head, closed chunks, is it real."""
    blocks: tl.constexpr = (ROWS + ROWS_BLOCK - 1) // ROWS_BLOCK
    stream = (tl.program_id(1) // blocks).to(tl.int64)
    first = (tl.program_id(1) % blocks) * ROWS_BLOCK
    length = tl.load(lengths_ptr + stream // KV_HEADS)
    m = tl.arange(0, ROWS_PAD * HEADS_PAD)
    row, head = first + m // HEADS_PAD, m % HEADS_PAD
    live = (m // HEADS_PAD < ROWS_BLOCK) & (row < ROWS) & (head < HEADS)
    closed = closed_chunks(length + row, CHUNK, WINDOW, dense_until)
    return stream, first, length, row, head, tl.where(live, closed, 0), live


@triton.jit
def _store_part(out_ptr, lse_ptr, cell, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD: tl.constexpr):
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
    features_ptr,
    lengths_ptr,
    scores_ptr,
    sums_ptr,
    part_out_ptr,
    part_lse_ptr,
    q_stream,
    q_head,
    q_row,
    k_stream,
    k_row,
    v_stream,
    v_row,
    features_stream,
    features_half,
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
    BALLS: tl.constexpr,
    BALLS_PAD: tl.constexpr,
    LOG2_BALL: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    CAP: tl.constexpr,
):
    """Near field and page scores, cut into steps that are dealt to ``splits`` programs.

    Grid: (splits, streams * blocks of queries). Writes, all float32 in log2 units: scores (streams,
    pages, queries, heads); sums (streams, splits, queries, heads), the program's log-sum-exp of scores;
    and the near field's partial results (streams, parts, queries, heads[, VALUE_DIM]).
    """
    stream, _, length, row, head, closed, live = _rows_of(
        lengths_ptr, dense_until, KV_HEADS, HEADS, HEADS_PAD, ROWS, ROWS_PAD, ROWS_BLOCK, CHUNK, WINDOW
    )
    rows: tl.constexpr = ROWS_PAD * HEADS_PAD
    per_chunk: tl.constexpr = CHUNK // PAGE
    split = tl.program_id(0)
    most = tl.max(closed, 0)
    begin = tl.min(tl.where(live, closed, most), 0) * CHUNK
    end = tl.minimum(tl.max(tl.where(live, length + row, 0), 0) + 1, capacity)
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
    k_base = k_ptr + stream * k_stream
    v_base = v_ptr + stream * v_stream
    near_last = tl.minimum(last_step, near_steps)
    for step in range(first_step, near_last):
        # Keys of the open chunk, this call's own among them, lie in order of position; all others
        # precede the queries. So a slot's number says whether a query may see it.
        key = begin + step * BLOCK_NEAR + tl.arange(0, BLOCK_NEAR)
        k = load_rows(k_base, key, k_row, key < end, DIM, DIM_PAD, True)
        v = load_rows(v_base, key, v_row, key < end, VALUE_DIM, VALUE_PAD, True)
        products = tl.dot(q, tl.trans(k), input_precision=EXACT)
        products = cap_logits(products, scale, softcap, CAP)
        visible = (key[None, :] >= (closed * CHUNK)[:, None]) & (key[None, :] <= (length + row)[:, None])
        products = tl.where(visible, products, float("-inf"))
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)
    seen = near_last > first_step
    _store_part(part_out_ptr, part_lse_ptr, part, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD)

    top = tl.full([rows], FLOOR, tl.float32)
    total = tl.zeros([rows], tl.float32)
    squares = scaled_squares(q, scale)
    base = features_ptr + stream * features_stream
    scores_base = scores_ptr + stream * (capacity // PAGE) * ROWS * HEADS
    index = tl.arange(0, BLOCK_PAGES * BALLS_PAD)
    for step in range(tl.maximum(first_step, near_steps) - near_steps, last_step - near_steps):
        page = step * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
        ball_page = step * BLOCK_PAGES + index // BALLS_PAD
        present = (index % BALLS_PAD < BALLS) & (ball_page < pages)
        ball = ball_page * BALLS + index % BALLS_PAD
        mean = load_rows(base, ball, DIM, present, DIM, DIM_PAD, True)
        spread = load_rows(base + features_half, ball, DIM, present, DIM, DIM_PAD, True)
        scores = ball_scores(q, squares, mean, spread, scale, softcap, LOG2_BALL, CAP)
        if BALLS > 1:
            scores = tl.where(present[None, :], scores, FLOOR)
            scores = tl.reshape(scores, [rows, BLOCK_PAGES, BALLS_PAD])
            peak = tl.max(scores, 2)
            scores = peak + tl.log2(tl.sum(tl.exp2(scores - peak[:, :, None]), 2))
        score_cells = scores_base + (page[None, :] * ROWS + row[:, None]) * HEADS + head[:, None]
        tl.store(score_cells, scores, mask=live[:, None] & (page < pages)[None, :])
        far = page[None, :] < (closed * per_chunk)[:, None]
        total, top = sum_step(total, top, tl.where(far, scores, float("-inf")))
    some = total > 0.0
    summed = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(sums_ptr + cell, summed, mask=live)


@triton.jit
def open_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    sink_page_ptr,
    sink_ptr,
    scores_ptr,
    sums_ptr,
    part_out_ptr,
    part_lse_ptr,
    counts_ptr,
    q_stream,
    q_head,
    q_row,
    k_stream,
    k_row,
    v_stream,
    v_row,
    capacity,
    splits,
    far_splits,
    dense_until,
    scale,
    softcap,
    log2_bar,
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
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Open pages by their shares and attend to them; every program takes each ``far_splits``-th page.

    Grid: (far_splits, streams * blocks of queries). Writes partial results behind those of the first
    ``splits`` programs, and counts (streams, far_splits, queries, 2) int32: pages that the query opened,
    and pages that its program read.
    """
    stream, first, length, row, head, closed, live = _rows_of(
        lengths_ptr, dense_until, KV_HEADS, HEADS, HEADS_PAD, ROWS, ROWS_PAD, ROWS_BLOCK, CHUNK, WINDOW
    )
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
        row_total = _row_totals(
            sums_ptr, part_lse_ptr, sink_ptr, stream, row, head, live, splits, far_splits,
            HEADS, ROWS, SPLITS_PAD, SINK,
        )  # fmt: skip
        q_offset = head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
        q = load_rows(q_ptr + stream * q_stream, q_offset, 1, live, DIM, DIM_PAD, True)
        factor = scale * LOG2E
        if CAP:
            factor = 1.0
        k_base = k_ptr + stream * k_stream
        v_base = v_ptr + stream * v_stream
        scores_base = scores_ptr + stream * (capacity // PAGE) * ROWS * HEADS
        sink_page = tl.load(sink_page_ptr + stream)
        far = closed_chunks(length + first + query, CHUNK, WINDOW, dense_until) * per_chunk
        far = tl.where(is_query, far, 0)
        place = tl.arange(0, WORD)
        bit = tl.full([WORD], 1, tl.int64) << place.to(tl.int64)
        pieces: tl.constexpr = (PAGE + BLOCK_KEYS - 1) // BLOCK_KEYS
        mine = (pages - split + far_splits - 1) // far_splits
        for word in range(0, mine, WORD):
            page = split + (word + place) * far_splits
            score_cells = scores_base + (page[:, None] * ROWS + row[None, :]) * HEADS + head[None, :]
            wanted = live[None, :] & (page < pages)[:, None]
            score = tl.load(score_cells, mask=wanted, other=float("-inf"))
            share = tl.reshape(score - row_total[None, :], [WORD, ROWS_PAD, HEADS_PAD])
            opened = (tl.max(share, 2) > log2_bar) | (page == sink_page)[:, None]
            opened = (opened & (page[:, None] < far[None, :])).to(tl.int64)
            some = tl.max(opened, 1)
            count = tl.sum(some, 0).to(tl.int32)
            opened_pages += tl.sum(opened, 0).to(tl.int32)
            read_pages += count
            bits = tl.sum(some * bit, 0)
            row_bits = tl.sum(opened * bit[:, None], 0)
            row_bits = tl.reshape(tl.broadcast_to(row_bits[:, None], [ROWS_PAD, HEADS_PAD]), [rows])
            for step in range(0, count * pieces):
                lowest = bits & (-bits)
                # A power of two as a float is its exponent.
                at = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                piece = step % pieces
                bits = tl.where(piece == pieces - 1, bits ^ lowest, bits)
                within = piece * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
                slot = (split + (word + at) * far_splits) * PAGE + within
                k = load_rows(k_base, slot, k_row, within < PAGE, DIM, DIM_PAD, PAGE % BLOCK_KEYS != 0)
                v = load_rows(
                    v_base, slot, v_row, within < PAGE, VALUE_DIM, VALUE_PAD, PAGE % BLOCK_KEYS != 0
                )
                products = tl.dot(q, tl.trans(k), input_precision=EXACT)
                products = cap_logits(products, scale, softcap, CAP)
                if PAGE % BLOCK_KEYS != 0:
                    products = tl.where((within < PAGE)[None, :], products, float("-inf"))
                sees = ((row_bits >> at.to(tl.int64)) & 1) == 1
                acc, total, top = softmax_step(
                    acc, total, top, products, factor, v, sees, ROWS_BLOCK > 1
                )  # fmt: skip
    seen = tl.max(read_pages, 0) > 0
    _store_part(part_out_ptr, part_lse_ptr, part, acc, total, top, seen, live, VALUE_DIM, VALUE_PAD)
    counted = ((stream * far_splits + split) * ROWS + first + query) * 2
    tl.store(counts_ptr + counted, opened_pages, mask=is_query)
    tl.store(counts_ptr + counted + 1, read_pages, mask=is_query)


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


@triton.jit
def merge_kernel(
    part_out_ptr,
    part_lse_ptr,
    counts_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    opened_ptr,
    read_ptr,
    parts,
    far_splits,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    FAR_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SINK: tl.constexpr,
):
    """Merge partial results by their log-sum-exp. Grid: (heads * queries, streams), one program a row.

    Writes out (streams, heads, queries, VALUE_DIM) and lse (streams, heads, queries) in natural units, and
    the sums of counts, opened and read (streams, queries).
    """
    stream = tl.program_id(1).to(tl.int64)
    head, row = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS
    index = tl.arange(0, PARTS_PAD)
    base = stream * parts * ROWS * HEADS + row * HEADS + head
    lse = tl.load(part_lse_ptr + base + index * (ROWS * HEADS), mask=index < parts, other=float("-inf"))
    peak = tl.maximum(tl.max(lse, 0), FLOOR)
    if SINK:
        sink = tl.load(sink_ptr + stream * HEADS + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(tl.exp2(lse - peak), 0)
    if SINK:
        total += tl.exp2(sink - peak)
    column = tl.arange(0, VALUE_PAD)
    out = tl.zeros([VALUE_PAD], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        cell = base + part * (ROWS * HEADS)
        weight = tl.exp2(tl.load(part_lse_ptr + cell, mask=part < parts, other=float("-inf")) - peak)
        # What saw no key wrote no output.
        there = (weight > 0.0)[:, None] & (column < VALUE_DIM)[None, :]
        cells = part_out_ptr + cell[:, None] * VALUE_DIM + column[None, :]
        out += tl.sum(weight[:, None] * tl.load(cells, mask=there, other=0.0), 0)
    target = (stream * HEADS + head) * ROWS + row
    tl.store(
        out_ptr + target * VALUE_DIM + column,
        (out / total).to(out_ptr.dtype.element_ty),
        mask=column < VALUE_DIM,
    )
    tl.store(lse_ptr + target, (peak + tl.log2(total)) * LN2)
    if head == 0:
        opened, read = 0, 0
        if FAR_PAD > 0:
            split = tl.arange(0, FAR_PAD)
            cells = counts_ptr + ((stream * far_splits + split) * ROWS + row) * 2
            opened = tl.sum(tl.load(cells, mask=split < far_splits, other=0), 0)
            read = tl.sum(tl.load(cells + 1, mask=split < far_splits, other=0), 0)
        tl.store(opened_ptr + stream * ROWS + row, opened)
        tl.store(read_ptr + stream * ROWS + row, read)
