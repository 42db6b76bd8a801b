"""Kernels of the token-masked mode: position 0 and window in order of text, balls in tree order."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import (
    FLOOR,
    LN2,
    LOG2E,
    load_rows,
    softmax_step,
)


@triton.jit
def _store_rows(out_ptr, lse_ptr, cell, acc, total, top, live, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Write contiguous rows of an output and its log-sum-exp; a row that saw nothing gets zeros and -inf."""
    column = tl.arange(0, DIM_PAD)
    cells = out_ptr + cell[:, None] * DIM + column[None, :]
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(cells, out, mask=live[:, None] & (column < DIM)[None, :])
    lse = tl.where(sees, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + cell, lse, mask=live)


@triton.jit(do_not_specialize=["rows", "count", "window"])
def window_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    rows,
    count,
    window,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Attention of the last ``rows`` of ``count`` positions to position 0 and the ``window`` last keys.

    Keys in order of position. Writes contiguous (batch, heads, rows, VALUE_DIM) float32 and
    (batch, heads, rows) float32. Grid: (tiles of rows, heads, batch).
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * TILE
    row = first + tl.arange(0, TILE)
    live = row < rows
    position = count - rows + row
    q = load_rows(q_ptr + batch * q_batch + head * q_head, row, q_row, live, DIM, DIM_PAD, True)
    k_base = k_ptr + batch * k_batch + head // GROUP * k_head
    v_base = v_ptr + batch * v_batch + head // GROUP * v_head
    factor = scale * LOG2E

    # Every row sees position 0: the softmax begins with it, and needs no block for one key.
    column = tl.arange(0, DIM_PAD)
    k_first = tl.load(k_base + column, mask=column < DIM, other=0.0)
    top = tl.sum(q.to(tl.float32) * k_first.to(tl.float32)[None, :], 1) * factor
    total = tl.full([TILE], 1.0, tl.float32)
    column = tl.arange(0, VALUE_PAD)
    v_first = tl.load(v_base + column, mask=column < VALUE_DIM, other=0.0)
    acc = tl.zeros([TILE, VALUE_PAD], tl.float32) + v_first.to(tl.float32)[None, :]

    end = tl.minimum(count - rows + first + TILE, count)
    for begin in range(tl.maximum(count - rows + first - window + 1, 1), end, PAGE):
        key = begin + tl.arange(0, PAGE)
        k = load_rows(k_base, key, k_row, key < end, DIM, DIM_PAD, True)
        v = load_rows(v_base, key, v_row, key < end, VALUE_DIM, VALUE_PAD, True)
        products = tl.dot(q, tl.trans(k))
        visible = (key[None, :] > position[:, None] - window) & (key[None, :] <= position[:, None])
        products = tl.where(visible, products, float("-inf"))
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)

    cell = (batch * HEADS + head) * rows + row
    _store_rows(out_ptr, lse_ptr, cell, acc, total, top, live, VALUE_DIM, VALUE_PAD)


@triton.jit(do_not_specialize=["rows", "first_tile", "capacity"])
def ball_list_kernel(
    low_ptr,
    high_ptr,
    pages_ptr,
    counts_ptr,
    rows,
    first_tile,
    capacity,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the pages that some row of a tile sees a key of; one program per tile, head and sequence.

    Args:
        low_ptr, high_ptr: (batch * heads, rows) int32, slots that a row sees.
        pages_ptr: (batch * heads, tiles, capacity) int32, gets ascending, left-packed pages.
        counts_ptr: (batch * heads, tiles) int32, gets their number.
    """
    head = tl.program_id(1).to(tl.int64)
    listed = head * tl.num_programs(0) + tl.program_id(0)
    row = (first_tile + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    low = tl.load(low_ptr + head * rows + row, mask=row < rows, other=0)
    high = tl.load(high_ptr + head * rows + row, mask=row < rows, other=0)
    sees = high > low
    begin = tl.min(tl.where(sees, low, 2147483647), 0) // PAGE
    end = tl.cdiv(tl.max(tl.where(sees, high, 0), 0), PAGE)
    count = tl.full([], 0, tl.int32)
    for block in range(begin, end, BLOCK):
        page = block + tl.arange(0, BLOCK)
        meets = (low[:, None] < (page * PAGE + PAGE)[None, :]) & (high[:, None] > (page * PAGE)[None, :])
        read = tl.max((meets & sees[:, None]).to(tl.int32), 0)
        tl.store(pages_ptr + listed * capacity + count + tl.cumsum(read, 0) - 1, page, mask=read > 0)
        count += tl.sum(read, 0)
    tl.store(counts_ptr + listed, count)


@triton.jit(do_not_specialize=["rows", "slots", "first_tile", "capacity"])
def ball_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_order_ptr,
    row_order_ptr,
    low_ptr,
    high_ptr,
    pages_ptr,
    counts_ptr,
    near_out_ptr,
    near_lse_ptr,
    out_ptr,
    lse_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    rows,
    slots,
    first_tile,
    capacity,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Go on from near results over a share of a tile's listed pages, each row over the slots it sees.

    Rows are tiled in tree order: the row at place i of a head is ``row_order[i]``, and sees the slots
    ``low[i] … high[i] - 1``, that is its ball up to a position. Slot j holds position ``key_order[j]``: keys
    and values stay where they are, since every query head has an order of its own. Writes contiguous (shares,
    batch, heads, rows, VALUE_DIM) and (shares, batch, heads, rows); the first share holds the near results.
    Grid: (tiles of this launch, batch * heads, shares).
    """
    wide_head = tl.program_id(1).to(tl.int64)
    batch, head = wide_head // HEADS, wide_head % HEADS
    listed = wide_head * tl.num_programs(0) + tl.program_id(0)
    at = (first_tile + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    live = at < rows
    place = wide_head * rows + at
    row = tl.load(row_order_ptr + place, mask=live, other=0)
    low = tl.load(low_ptr + place, mask=live, other=0)
    high = tl.load(high_ptr + place, mask=live, other=0)
    cell = wide_head * rows + row
    share = tl.program_id(2).to(tl.int64)
    q = load_rows(q_ptr + batch * q_batch + head * q_head, row, q_row, live, DIM, DIM_PAD, True)
    begins = at < tl.where(share == 0, rows, 0)
    acc = load_rows(near_out_ptr, cell, VALUE_DIM, begins, VALUE_DIM, VALUE_PAD, True)
    top = tl.load(near_lse_ptr + cell, mask=begins, other=FLOOR) * LOG2E
    total = tl.where(begins, 1.0, 0.0)
    k_base = k_ptr + batch * k_batch + head // GROUP * k_head
    v_base = v_ptr + batch * v_batch + head // GROUP * v_head
    factor = scale * LOG2E
    pages = tl.load(counts_ptr + listed)
    shares = tl.num_programs(2)
    for index in range(share * pages // shares, (share + 1) * pages // shares):
        slot = tl.load(pages_ptr + listed * capacity + index) * PAGE + tl.arange(0, PAGE)
        key = tl.load(key_order_ptr + wide_head * slots + slot, mask=slot < slots, other=0)
        k = load_rows(k_base, key, k_row, slot < slots, DIM, DIM_PAD, True)
        v = load_rows(v_base, key, v_row, slot < slots, VALUE_DIM, VALUE_PAD, True)
        products = tl.dot(q, tl.trans(k))
        visible = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
        products = tl.where(visible, products, float("-inf"))
        acc, total, top = softmax_step(acc, total, top, products, factor, v, live, False)
    cell += share * tl.num_programs(1) * rows
    _store_rows(out_ptr, lse_ptr, cell, acc, total, top, live, VALUE_DIM, VALUE_PAD)
