"""Gradients of keys and values: a program owns its keys and walks the rows that see them, so none is added
to from two sides and the sums have one order.

Sums stand on their side, (dim, keys): the matrix units of Hopper want 64 rows, and pages have fewer keys.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.backward.query_kernel import logit_gradients
from llama_surgery.attention.impl.triton.helpers import ENTRY, EXACT, LOG2E, closed_chunks, load_rows


@triton.jit
def _add_rows(
    d_k, d_v, k, v, q_ptr, q_offset, lse_ptr, delta_ptr, d_out_ptr, cell, live, seen, visible, scale,
    softcap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    CAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add what a block of rows gives to d_k, less its scale, and d_v: (dim, keys) both.

    Args:
        q_offset, cell: (rows,) where queries, and contiguous states of rows, lie.
        live: (rows,) bool, rows that are there.
        seen: (rows,) bool, rows that see the keys.
        visible: (rows, keys) bool, with MASK.
    """
    q = load_rows(q_ptr, q_offset, 1, live, DIM, DIM_PAD, True)
    d_out = load_rows(d_out_ptr, cell, VALUE_DIM, live, VALUE_DIM, VALUE_PAD, True)
    shift = tl.load(lse_ptr + cell, mask=live & seen, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + cell, mask=live, other=0.0)
    weights, inner = logit_gradients(q, k, v, d_out, shift, delta, visible, scale, softcap, CAP, MASK)
    d_v = tl.dot(tl.trans(d_out), weights.to(d_out.dtype), d_v, input_precision=EXACT)
    d_k = tl.dot(tl.trans(q), inner.to(q.dtype), d_k, input_precision=EXACT)
    return d_k, d_v


@triton.jit
def _store_keys(ptr, sums, slot, present, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ADD: tl.constexpr):
    """Write (dim, keys) sums as rows of contiguous (keys, DIM), with ADD onto what is there."""
    column = tl.arange(0, DIM_PAD)
    cells = ptr + slot.to(tl.int64)[:, None] * DIM + column[None, :]
    keep = present[:, None] & (column < DIM)[None, :]
    sums = tl.trans(sums)
    if ADD:
        sums += tl.load(cells, mask=keep, other=0.0)
    tl.store(cells, sums.to(ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "start", "near_start", "dense_until"])
def near_gradient_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, d_out_ptr, d_k_ptr, d_v_ptr, q_chooser, q_head, q_row, k_stream,
    k_row, v_stream, v_row, rows, start, near_start, dense_until, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradients of near keys and values; one program per BLOCK_KEYS of them and stream.

    d_k and d_v are contiguous (streams, near keys, dim); keys outside every near field get zeros.
    """
    stream = tl.program_id(1).to(tl.int64)
    stop = start + rows
    first = near_start + tl.program_id(0) * BLOCK_KEYS
    key = first + tl.arange(0, BLOCK_KEYS)
    present = key < stop
    slot = key - near_start
    k = load_rows(k_ptr + stream * k_stream, slot, k_row, present, DIM, DIM_PAD, True)
    v = load_rows(v_ptr + stream * v_stream, slot, v_row, present, VALUE_DIM, VALUE_PAD, True)
    d_k = tl.zeros([DIM_PAD, BLOCK_KEYS], tl.float32)
    d_v = tl.zeros([VALUE_PAD, BLOCK_KEYS], tl.float32)

    # The last key's chunk is the last of the block to be closed: from there on no row sees any of it.
    last = tl.minimum(first + BLOCK_KEYS, stop) - 1
    low = tl.maximum(start, first)
    high = tl.minimum(stop, tl.maximum(dense_until, (last // CHUNK + 1) * CHUNK + WINDOW))
    heads: tl.constexpr = GROUP * HEADS
    for index in range(0, tl.cdiv(tl.maximum(high - low, 0), BLOCK_ROWS) * heads):
        position = low + index // heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        head = stream * heads + index % heads
        live = position < high
        local = (position - start).to(tl.int64)
        begin = closed_chunks(position // TILE * TILE, CHUNK, WINDOW, dense_until) * CHUNK
        visible = (key[None, :] <= position[:, None]) & (key[None, :] >= begin[:, None])
        d_k, d_v = _add_rows(
            d_k, d_v, k, v, q_ptr + head // HEADS * q_chooser + head % HEADS * q_head, local * q_row,
            lse_ptr, delta_ptr, d_out_ptr, head * rows + local, live, live, visible,
            scale, softcap, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAP, True,
        )  # fmt: skip

    base = stream * (stop - near_start)
    _store_keys(d_k_ptr, d_k * scale, base + slot, present, DIM, DIM_PAD, False)
    _store_keys(d_v_ptr, d_v, base + slot, present, VALUE_DIM, VALUE_PAD, False)


@triton.jit(do_not_specialize=["pages", "tiles", "slots", "rows", "start", "first_tile"])
def far_gradient_kernel(
    q_ptr, k_ptr, v_ptr, readers_ptr, counts_ptr, lse_ptr, delta_ptr, d_out_ptr, d_k_ptr, d_v_ptr, q_chooser,
    q_head, q_row, k_stream, k_row, v_stream, v_row, pages, tiles, slots, rows, start, first_tile, scale,
    softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, TILE: tl.constexpr,
    TILE_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, CAP: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of far keys and values in tree order; one program per page and stream.

    Walks the tiles that read the page, chooser by chooser, from ``reader_kernel``; pages from ``pages``
    on are read by none. d_k and d_v are contiguous (streams, slots, dim); with ADD they are added to.
    Early pages have the most readers and their programs come first, so that the longest are not the last
    to finish.
    """
    head_blocks: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    page = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    within = tl.arange(0, PAGE_PAD)
    of_page = within < PAGE
    slot = page * PAGE + within
    k = load_rows(k_ptr + stream * k_stream, slot, k_row, of_page, DIM, DIM_PAD, True)
    v = load_rows(v_ptr + stream * v_stream, slot, v_row, of_page, VALUE_DIM, VALUE_PAD, True)
    d_k = tl.zeros([DIM_PAD, PAGE_PAD], tl.float32)
    d_v = tl.zeros([VALUE_PAD, PAGE_PAD], tl.float32)
    m = tl.arange(0, TILE_PAD * HEADS_BLOCK)
    row = m % TILE_PAD

    for chooser in range(stream * GROUP, (stream + 1) * GROUP):
        read = chooser * pages + page
        count = tl.load(counts_ptr + read, mask=page < pages, other=0)
        for index in range(0, count * head_blocks):
            reader = tl.load(readers_ptr + read * tiles + index // head_blocks)
            tile = reader // ENTRY
            head = index % head_blocks * HEADS_BLOCK + m // TILE_PAD
            position = (first_tile + tile) * TILE + row
            live = (row < TILE) & (head < HEADS) & (position >= start) & (position < start + rows)
            local = (position - start).to(tl.int64)
            d_k, d_v = _add_rows(
                d_k, d_v, k, v, q_ptr + chooser * q_chooser, head.to(tl.int64) * q_head + local * q_row,
                lse_ptr, delta_ptr, d_out_ptr, (chooser * HEADS + head) * rows + local, live,
                row >= reader % ENTRY, of_page[None, :],
                scale, softcap, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, CAP, PAGE != PAGE_PAD,
            )  # fmt: skip

    base = stream * slots
    _store_keys(d_k_ptr, d_k * scale, base + slot, of_page, DIM, DIM_PAD, ADD)
    _store_keys(d_v_ptr, d_v, base + slot, of_page, VALUE_DIM, VALUE_PAD, ADD)
