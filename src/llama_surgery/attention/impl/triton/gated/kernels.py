"""Rows times all pages of their closed chunks, logits with a bias for every row and page, and the gradients.

A program owns a tile of one query head, or a block of keys for one query head; nothing is added atomically.
Pages whose bias is below FAINT in all rows of a tile are left out: nothing of them is left in the softmax.
The kernels' parameters are much alike, but they are the signatures of launches: Triton has no shared ones.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import EXACT, FLOOR, LN2, LOG2E, closed_chunks, load_rows

#: A factor of e^-30 on a page's weight.
FAINT = tl.constexpr(-30.0)


@triton.jit
def _biases(base, row, bias_row, page, live, ROWS: tl.constexpr, PAGES: tl.constexpr):
    """Biases (ROWS, PAGES) from ``page`` on; FLOOR in rows that are not there."""
    cells = base + row.to(tl.int64)[:, None] * bias_row + (page + tl.arange(0, PAGES))[None, :]
    return tl.load(cells, mask=live[:, None], other=FLOOR)


@triton.jit
def _by_key(by_page, ROWS: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr):
    """(ROWS, PAGES) to (ROWS, PAGES * PAGE): each page's number for all of its keys."""
    spread = tl.broadcast_to(by_page[:, :, None], [ROWS, PAGES, PAGE])
    return tl.reshape(spread, [ROWS, PAGES * PAGE])


@triton.jit(do_not_specialize=["rows", "start", "dense_until"])
def gated_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    q_chooser,
    q_row,
    k_stream,
    v_stream,
    bias_chooser,
    bias_row,
    rows,
    start,
    dense_until,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Output and log-sum-exp of a tile over the pages of its closed chunks.

    Rows of ``q`` (choosers, rows, DIM) are at positions from ``start`` on, a multiple of TILE; keys and
    values (streams, slots, dim) have contiguous rows; biases (choosers, rows, pages) are float32, in nats.
    Written: out (choosers, rows, VALUE_DIM) and lse (choosers, rows), contiguous, float32.
    """
    chooser = tl.program_id(1).to(tl.int64)
    stream = chooser // GROUP
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < rows
    q = load_rows(q_ptr + chooser * q_chooser, row, q_row, live, DIM, DIM_PAD, True)
    pages = closed_chunks(start + tl.program_id(0) * TILE, CHUNK, WINDOW, dense_until) * (CHUNK // PAGE)
    step = tl.arange(0, PAGES * PAGE)
    acc = tl.zeros([TILE, VALUE_PAD], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], FLOOR, tl.float32)
    for page in range(0, pages, PAGES):
        bias = _biases(bias_ptr + chooser * bias_chooser, row, bias_row, page, live, TILE, PAGES)
        if tl.max(tl.max(bias, 1), 0) > FAINT:
            key = page * PAGE + step
            k = load_rows(k_ptr + stream * k_stream, key, DIM, live, DIM, DIM_PAD, False)
            v = load_rows(v_ptr + stream * v_stream, key, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, False)
            logits = tl.dot(q, tl.trans(k), input_precision=EXACT) * (scale * LOG2E)
            logits += _by_key(bias, TILE, PAGES, PAGE) * LOG2E
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=EXACT)
            top = new_top
    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, FLOOR)
    column = tl.arange(0, VALUE_PAD)
    cell = chooser * rows + row
    keep = live[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out_ptr + cell[:, None] * VALUE_DIM + column[None, :], out, mask=keep)
    tl.store(lse_ptr + cell, lse, mask=live)


@triton.jit
def _logit_gradients(q, k, v, d_out, bias, lse, delta, scale):
    """Weights and gradients of the logits, (rows, keys); see ``backward.query_kernel.logit_gradients``."""
    products = tl.dot(q, tl.trans(k), input_precision=EXACT)
    weights = tl.exp2(products * (scale * LOG2E) + (bias - lse[:, None]) * LOG2E)
    return weights, weights * (tl.dot(d_out, tl.trans(v), input_precision=EXACT) - delta[:, None])


@triton.jit(do_not_specialize=["rows", "start", "dense_until"])
def gated_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    d_out_ptr,
    d_q_ptr,
    d_bias_ptr,
    q_chooser,
    q_row,
    k_stream,
    v_stream,
    bias_chooser,
    bias_row,
    rows,
    start,
    dense_until,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Gradients of queries (choosers, rows, DIM) and of biases, laid out as these.

    Arguments are those of ``gated_kernel``; contiguous are d_out (choosers, rows, VALUE_DIM) in the values'
    dtype, lse and delta (choosers, rows) float32.
    """
    chooser = tl.program_id(1).to(tl.int64)
    stream = chooser // GROUP
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = row < rows
    cell = chooser * rows + row
    q = load_rows(q_ptr + chooser * q_chooser, row, q_row, live, DIM, DIM_PAD, True)
    d_out = load_rows(d_out_ptr, cell, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, True)
    lse = tl.load(lse_ptr + cell, mask=live, other=0.0)
    delta = tl.load(delta_ptr + cell, mask=live, other=0.0)
    pages = closed_chunks(start + tl.program_id(0) * TILE, CHUNK, WINDOW, dense_until) * (CHUNK // PAGE)
    step = tl.arange(0, PAGES * PAGE)
    d_q = tl.zeros([TILE, DIM_PAD], tl.float32)
    for page in range(0, pages, PAGES):
        bias = _biases(bias_ptr + chooser * bias_chooser, row, bias_row, page, live, TILE, PAGES)
        if tl.max(tl.max(bias, 1), 0) > FAINT:
            key = page * PAGE + step
            k = load_rows(k_ptr + stream * k_stream, key, DIM, live, DIM, DIM_PAD, False)
            v = load_rows(v_ptr + stream * v_stream, key, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, False)
            spread = _by_key(bias, TILE, PAGES, PAGE)
            _, inner = _logit_gradients(q, k, v, d_out, spread, lse, delta, scale)
            d_q = tl.dot(inner.to(k.dtype), k, d_q, input_precision=EXACT)
            d_bias = tl.sum(tl.reshape(inner, [TILE, PAGES, PAGE]), 2)
            cells = row.to(tl.int64)[:, None] * bias_row + (page + tl.arange(0, PAGES))[None, :]
            tl.store(d_bias_ptr + chooser * bias_chooser + cells, d_bias, mask=live[:, None])
    column = tl.arange(0, DIM_PAD)
    keep = live[:, None] & (column < DIM)[None, :]
    tl.store(d_q_ptr + cell[:, None] * DIM + column[None, :], d_q * scale, mask=keep)


@triton.jit(do_not_specialize=["rows", "start", "dense_until", "slots"])
def gated_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse_ptr,
    delta_ptr,
    d_out_ptr,
    d_k_ptr,
    d_v_ptr,
    q_chooser,
    q_row,
    k_stream,
    v_stream,
    bias_chooser,
    bias_row,
    rows,
    start,
    dense_until,
    slots,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
):
    """What each query head gives to the gradients of keys and values: (choosers, slots, dim) float32.

    Arguments are those of ``gated_query_kernel``.
    """
    chooser = tl.program_id(1).to(tl.int64)
    stream = chooser // GROUP
    page = tl.program_id(0) * PAGES
    key = page * PAGE + tl.arange(0, PAGES * PAGE)
    there = key < slots
    k = load_rows(k_ptr + stream * k_stream, key, DIM, there, DIM, DIM_PAD, False)
    v = load_rows(v_ptr + stream * v_stream, key, VALUE_DIM, there, VALUE_DIM, VALUE_PAD, False)
    d_k = tl.zeros([PAGES * PAGE, DIM_PAD], tl.float32)
    d_v = tl.zeros([PAGES * PAGE, VALUE_PAD], tl.float32)
    # Window, chunks and dense_until are multiples of the tile.
    first = tl.maximum((page * PAGE // CHUNK + 1) * CHUNK + WINDOW, dense_until)
    for begin in range(tl.maximum(first - start, 0), rows, TILE):
        row = begin + tl.arange(0, TILE)
        live = row < rows
        bias = _biases(bias_ptr + chooser * bias_chooser, row, bias_row, page, live, TILE, PAGES)
        if tl.max(tl.max(bias, 1), 0) > FAINT:
            cell = chooser * rows + row
            q = load_rows(q_ptr + chooser * q_chooser, row, q_row, live, DIM, DIM_PAD, True)
            d_out = load_rows(d_out_ptr, cell, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, True)
            lse = tl.load(lse_ptr + cell, mask=live, other=0.0)
            delta = tl.load(delta_ptr + cell, mask=live, other=0.0)
            spread = _by_key(bias, TILE, PAGES, PAGE)
            weights, inner = _logit_gradients(q, k, v, d_out, spread, lse, delta, scale)
            d_v = tl.dot(tl.trans(weights.to(v.dtype)), d_out, d_v, input_precision=EXACT)
            d_k = tl.dot(tl.trans(inner.to(k.dtype)), q, d_k, input_precision=EXACT)
    column = tl.arange(0, DIM_PAD)
    cell = chooser * slots + key
    keep = there[:, None] & (column < DIM)[None, :]
    tl.store(d_k_ptr + cell[:, None] * DIM + column[None, :], d_k * scale, mask=keep)
    column = tl.arange(0, VALUE_PAD)
    keep = there[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(d_v_ptr + cell[:, None] * VALUE_DIM + column[None, :], d_v, mask=keep)
