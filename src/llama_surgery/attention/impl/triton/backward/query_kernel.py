"""Gradients of logits, and the kernel that walks every tile's near field and pages for those of queries."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import ENTRY, EXACT, LOG2E, closed_chunks, load_rows, tanh


@triton.jit
def logit_gradients(
    q, k, v, d_out, shift, delta, visible, scale, softcap, CAP: tl.constexpr, MASK: tl.constexpr
):
    """Softmax weights of a block of keys, recomputed, and gradients of its products, all (rows, keys).

    With weights p = exp(logit - lse), dp = d_out·v and delta = d_out·out - d_lse, the gradient of a logit is
    p·(dp - delta); see Dao et al., FlashAttention, 2022, appendix B. A cap ``c·tanh(x/c)`` multiplies what
    goes on to x by ``1 - tanh²``.

    Args:
        q, d_out: (rows, dim); k, v: (keys, dim).
        shift: (rows,) log2-unit log-sum-exp; inf hides the block from a row.
        delta: (rows,).
        visible: (rows, keys) bool, with MASK.

    Returns:
        Weights, and gradients of the scaled products that a cap was put on, if any.
    """
    products = tl.dot(q, tl.trans(k), input_precision=EXACT)
    if CAP:
        bent = tanh(products * (scale / softcap))
        weights = tl.exp2(bent * (softcap * LOG2E) - shift[:, None])
    else:
        weights = tl.exp2(products * (scale * LOG2E) - shift[:, None])
    if MASK:
        weights = tl.where(visible, weights, 0.0)
    d_logits = weights * (tl.dot(d_out, tl.trans(v), input_precision=EXACT) - delta[:, None])
    if CAP:
        d_logits = d_logits * (1.0 - bent * bent)
    return weights, d_logits


@triton.jit(
    do_not_specialize=[
        "tiles", "capacity", "rows", "start", "stop", "near_start", "first_tile", "dense_until",
    ],
)  # fmt: skip
def query_gradient_kernel(
    q_ptr, near_k_ptr, near_v_ptr, far_k_ptr, far_v_ptr, entries_ptr, counts_ptr, out_ptr, lse_ptr,
    d_out_ptr, d_lse_ptr, d_q_ptr, delta_ptr, q_chooser, q_head, q_row, near_k_stream, near_k_row,
    near_v_stream, near_v_row, far_k_stream, far_k_row, far_v_stream, far_v_row, tiles, capacity, rows,
    start, stop, near_start, first_tile, dense_until, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, TILE: tl.constexpr,
    TILE_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr, BLOCK_NEAR: tl.constexpr, FAR: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and delta for the kernels of keys.

    Programs, matrix tiles and lists are those of ``attend_kernel``. Without strides, tensors are
    contiguous: out, d_out and d_q (choosers, heads, rows, dim); lse, d_lse (or None) and delta (choosers,
    heads, rows) float32.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    tile = tl.program_id(0) // head_blocks
    chooser = tl.program_id(1).to(tl.int64)
    stream = chooser // GROUP
    m = tl.arange(0, TILE_PAD * HEADS_BLOCK)
    row = m % TILE_PAD
    head = (tl.program_id(0) % head_blocks) * HEADS_BLOCK + m // TILE_PAD
    q_first = (first_tile + tile) * TILE
    position = q_first + row
    live = (row < TILE) & (head < HEADS) & (position >= start) & (position < stop)
    local = (position - start).to(tl.int64)
    q = load_rows(
        q_ptr + chooser * q_chooser, head.to(tl.int64) * q_head + local * q_row, 1, live, DIM, DIM_PAD, True
    )
    cell = (chooser * HEADS + head) * rows + local
    d_out = load_rows(d_out_ptr, cell, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, True)
    out = load_rows(out_ptr, cell, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + cell, mask=live, other=0.0)
    tl.store(delta_ptr + cell, delta, mask=live)
    shift = tl.load(lse_ptr + cell, mask=live, other=float("inf")) * LOG2E
    d_q = tl.zeros([TILE_PAD * HEADS_BLOCK, DIM_PAD], tl.float32)

    k_base = near_k_ptr + stream * near_k_stream
    v_base = near_v_ptr + stream * near_v_stream
    begin = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * CHUNK
    # Keys up to the tile's first query are seen by every row: only what follows needs the mask.
    diagonal = begin + (q_first + 1 - begin) // BLOCK_NEAR * BLOCK_NEAR
    end = tl.minimum(q_first + TILE, stop)
    step = tl.arange(0, BLOCK_NEAR)
    for block in range(begin, diagonal, BLOCK_NEAR):
        key = block + step
        k = load_rows(k_base, key - near_start, near_k_row, live, DIM, DIM_PAD, False)
        v = load_rows(v_base, key - near_start, near_v_row, live, VALUE_DIM, VALUE_PAD, False)
        _, inner = logit_gradients(q, k, v, d_out, shift, delta, live, scale, softcap, CAP, False)
        d_q = tl.dot(inner.to(k.dtype), k, d_q, input_precision=EXACT)
    for block in range(diagonal, end, BLOCK_NEAR):
        key = block + step
        k = load_rows(k_base, key - near_start, near_k_row, key < end, DIM, DIM_PAD, True)
        v = load_rows(v_base, key - near_start, near_v_row, key < end, VALUE_DIM, VALUE_PAD, True)
        causal = (key[None, :] <= position[:, None]) & (key < end)[None, :]
        _, inner = logit_gradients(q, k, v, d_out, shift, delta, causal, scale, softcap, CAP, True)
        d_q = tl.dot(inner.to(k.dtype), k, d_q, input_precision=EXACT)

    if FAR:
        k_base = far_k_ptr + stream * far_k_stream
        v_base = far_v_ptr + stream * far_v_stream
        listed = chooser * tiles + tile
        count = tl.load(counts_ptr + listed)
        within = tl.arange(0, PAGE_PAD)
        of_page = within < PAGE
        for place in range(0, count):
            entry = tl.load(entries_ptr + listed * capacity + place)
            slot = (entry // ENTRY).to(tl.int64) * PAGE + within
            k = load_rows(k_base, slot, far_k_row, of_page, DIM, DIM_PAD, PAGE != PAGE_PAD)
            v = load_rows(v_base, slot, far_v_row, of_page, VALUE_DIM, VALUE_PAD, PAGE != PAGE_PAD)
            page_shift = tl.where(row >= entry % ENTRY, shift, float("inf"))
            _, inner = logit_gradients(
                q, k, v, d_out, page_shift, delta, of_page[None, :], scale, softcap, CAP, PAGE != PAGE_PAD
            )
            d_q = tl.dot(inner.to(k.dtype), k, d_q, input_precision=EXACT)

    column = tl.arange(0, DIM_PAD)
    cells = d_q_ptr + cell[:, None] * DIM + column[None, :]
    keep = live[:, None] & (column < DIM)[None, :]
    tl.store(cells, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=keep)
