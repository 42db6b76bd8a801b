"""The kernel that maps keys before the tree splits them, each alike in whatever call it comes."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import EXACT, load_rows


@triton.jit
def map_kernel(
    keys_ptr,
    map_ptr,
    out_ptr,
    key_stream,
    key_row,
    slots,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Linear maps of keys, (KV_HEADS, DIM, DIM) float32 rounded to the keys' dtype, one for each KV head.

    Writes (streams, slots, DIM), contiguous, in the keys' dtype. Grid: (blocks of ROWS keys * blocks of
    COLUMNS channels, streams).
    """
    column_blocks: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    stream = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    x = load_rows(keys_ptr + stream * key_stream, row, key_row, row < slots, DIM, DIM_PAD, True)
    weights = map_ptr + stream % KV_HEADS * DIM * DIM
    weight = load_rows(weights, column, DIM, column < DIM, DIM, DIM_PAD, True).to(x.dtype)
    mapped = tl.dot(x, tl.trans(weight), input_precision=EXACT)
    cells = (stream * slots + row)[:, None] * DIM + column[None, :]
    keep = (row < slots)[:, None] & (column < DIM)[None, :]
    tl.store(out_ptr + cells, mapped.to(out_ptr.dtype.element_ty), mask=keep)
