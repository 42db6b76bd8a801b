"""The kernel of prefill: near field, then listed far pages, in one online softmax."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    ENTRY,
    FLOOR,
    LN2,
    LOG2E,
    cap_logits,
    closed_chunks,
    first_slot,
    load_rows,
    of_piece,
    softmax_step,
)


@triton.jit(
    do_not_specialize=["tiles", "capacity", "start", "stop", "near_start", "first_tile", "dense_until"]
)
def attend_kernel(
    q_ptr, near_k, near_v, far_k, far_v, far_k_ptr, far_v_ptr, blocks_ptr, block_slots, entries_ptr,
    counts_ptr, sink_ptr, out_ptr, lse_ptr, q_chooser, q_head, q_row, far_k_stream, far_k_row, far_v_stream,
    far_v_row, out_chooser, out_head, out_row, lse_chooser, lse_head, tiles, capacity, pieces_ptr, start,
    stop, near_start, first_tile, dense_until, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, TILE: tl.constexpr,
    TILE_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr, PAGES_PER_STEP: tl.constexpr, BLOCK_NEAR: tl.constexpr, FAR: tl.constexpr,
    SUMMARY: tl.constexpr, SINK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries times HEADS_BLOCK heads of its chooser.

    Row m of the matrix tile is query ``m % TILE_PAD`` of head ``m // TILE_PAD``. Grid: (tiles of this
    launch * blocks of heads, choosers), GROUP choosers to a stream of keys. ``start … stop`` are the
    positions of the queries given, ``first_tile`` is the launch's first tile counted from position 0; with
    ``pieces_ptr`` tiles are those of a :class:`~.pieces.PieceTable`, and so are these.
    With SUMMARY rows of tiles that have closed chunks go on from what is in ``out`` and ``lse``.
    ``blocks_ptr`` and ``block_slots`` are for :func:`first_slot`.
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
    q_first = of_piece(pieces_ptr, tile, 0, (first_tile + tile) * TILE)
    origin = of_piece(pieces_ptr, tile, 1, start)
    start = of_piece(pieces_ptr, tile, 2, start)
    stop = of_piece(pieces_ptr, tile, 3, stop)
    near_start = of_piece(pieces_ptr, tile, 4, near_start)
    position = q_first + row
    live = (row < TILE) & (head < HEADS) & (position >= start) & (position < stop)
    q_offset = head.to(tl.int64) * q_head + (position - origin).to(tl.int64) * q_row
    q = load_rows(q_ptr + wide_chooser * q_chooser, q_offset, 1, live, DIM, DIM_PAD, True)

    top = tl.full([rows], FLOOR, tl.float32)
    total = tl.zeros([rows], tl.float32)
    if SINK:
        sink = tl.load(sink_ptr + chooser * HEADS + head, mask=head < HEADS, other=0.0)
        top = tl.maximum(sink.to(tl.float32) * LOG2E, FLOOR)
        total = total + 1.0
    acc = tl.zeros([rows, VALUE_PAD], tl.float32)
    begin = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * CHUNK
    column = tl.arange(0, VALUE_PAD)
    local = (position - origin).to(tl.int64)
    out_offset = wide_chooser * out_chooser + head.to(tl.int64) * out_head + local * out_row
    out_cells = out_ptr + out_offset[:, None] + column[None, :]
    lse_cells = lse_ptr + wide_chooser * lse_chooser + head.to(tl.int64) * lse_head + local
    keep = live[:, None] & (column < VALUE_DIM)[None, :]
    if FAR and SUMMARY:  # noqa: SIM102 (the other condition is known at run time)
        if begin > 0:
            # The means of pages that rows do not see are a key of their own, whose value is their output.
            standing = tl.load(lse_cells, mask=live, other=float("-inf")) * LOG2E
            new_top = tl.maximum(top, standing)
            total = total * tl.exp2(top - new_top)
            share = tl.exp2(standing - new_top)
            acc = tl.load(out_cells, mask=keep, other=0.0).to(tl.float32) * share[:, None]
            total += share
            top = new_top
    factor = scale * LOG2E
    if CAP:
        factor = 1.0

    # Keys up to the tile's first query are seen by every row: only what follows needs the mask.
    diagonal = begin + (q_first + 1 - begin) // BLOCK_NEAR * BLOCK_NEAR
    end = tl.minimum(q_first + TILE, stop)
    step = tl.arange(0, BLOCK_NEAR)
    for block in range(begin, diagonal, BLOCK_NEAR):
        k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
        v = near_v.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, VALUE_PAD)
        products = tl.dot(q, tl.trans(k))
        products = cap_logits(products, scale, softcap, CAP)
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)
    for block in range(diagonal, end, BLOCK_NEAR):
        key = block + step
        k = near_k.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, DIM_PAD)
        v = near_v.load([stream, block - near_start, 0]).reshape(BLOCK_NEAR, VALUE_PAD)
        products = tl.dot(q, tl.trans(k))
        products = cap_logits(products, scale, softcap, CAP)
        causal = (key[None, :] <= position[:, None]) & (key < end)[None, :]
        products = tl.where(causal, products, float("-inf"))
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)

    if FAR:
        k_base = far_k_ptr + stream.to(tl.int64) * far_k_stream
        v_base = far_v_ptr + stream.to(tl.int64) * far_v_stream
        listed = wide_chooser * tiles + tile
        entries = entries_ptr + listed * capacity
        count = tl.load(counts_ptr + listed)
        within = tl.arange(0, PAGES_PER_STEP * PAGE_PAD)
        for place in range(0, count, PAGES_PER_STEP):
            if PAGES_PER_STEP == 1:
                entry = tl.load(entries + place)
                first = first_slot(entry // ENTRY, blocks_ptr, block_slots, CHUNK, PAGE)
                k = far_k.load([stream, first, 0]).reshape(PAGE_PAD, DIM_PAD)
                v = far_v.load([stream, first, 0]).reshape(PAGE_PAD, VALUE_PAD)
                products = tl.dot(q, tl.trans(k))
                products = cap_logits(products, scale, softcap, CAP)
                if PAGE != PAGE_PAD:
                    products = tl.where((within < PAGE)[None, :], products, float("-inf"))
                acc, total, top = softmax_step(
                    acc, total, top, products, factor, v, row >= entry % ENTRY, True
                )
            else:
                at = place + within // PAGE_PAD
                present = (at < count) & (within % PAGE_PAD < PAGE)
                entry = tl.load(entries + at, mask=at < count, other=0)
                slot = first_slot(entry // ENTRY, blocks_ptr, block_slots, CHUNK, PAGE) + within % PAGE_PAD
                k = load_rows(k_base, slot, far_k_row, present, DIM, DIM_PAD, True)
                v = load_rows(v_base, slot, far_v_row, present, VALUE_DIM, VALUE_PAD, True)
                products = tl.dot(q, tl.trans(k))
                products = cap_logits(products, scale, softcap, CAP)
                visible = (row[:, None] >= (entry % ENTRY)[None, :]) & present[None, :]
                products = tl.where(visible, products, float("-inf"))
                acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)

    # A row that saw nothing gets zeros and a log-sum-exp of -inf.
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    lse = tl.where(total > 0.0, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(out_cells, out.to(out_ptr.dtype.element_ty), mask=keep)
    tl.store(lse_cells, lse, mask=live)
