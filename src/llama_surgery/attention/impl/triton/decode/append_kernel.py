"""New tokens of decode into the cache.

A cache lies in blocks of one chunk. ``_sequence``, ``_head``, ``_block`` and ``_row`` are a tensor's elements
from one sequence, KV head, block and row of a block to the next. With PAGED a table says which block holds a
sequence's chunk; without, chunk and block are one.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import load_rows


@triton.jit
def block_of(table_ptr, entry, chunk, PAGED: tl.constexpr):
    """Blocks, as int64, of a sequence's chunks, whose table begins at ``entry``."""
    if PAGED:
        return tl.load(table_ptr + entry + chunk).to(tl.int64)
    else:
        return tl.cast(chunk, tl.int64)


@triton.jit
def append_kernel(
    new_k_ptr,
    new_v_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    new_k_stream,
    new_k_row,
    new_v_stream,
    new_v_row,
    k_sequence,
    k_head,
    k_block,
    k_row,
    v_sequence,
    v_head,
    v_block,
    v_row,
    table_row,
    capacity,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Write ROWS new keys and values behind the cached ones, as far as there is room. Grid: (streams,)."""
    stream = tl.program_id(0).to(tl.int64)
    sequence, kv_head = stream // KV_HEADS, stream % KV_HEADS
    row = tl.arange(0, ROWS_PAD)
    slot = tl.load(lengths_ptr + sequence) + row
    present = (row < ROWS) & (slot >= 0) & (slot < capacity)
    k = load_rows(new_k_ptr + stream * new_k_stream, row, new_k_row, present, DIM, DIM_PAD, True)
    v = load_rows(new_v_ptr + stream * new_v_stream, row, new_v_row, present, VALUE_DIM, VALUE_PAD, True)
    chunk = tl.where(present, slot, 0) // CHUNK
    block = block_of(table_ptr, sequence * table_row, chunk, PAGED)
    slot = (slot % CHUNK).to(tl.int64)
    k_cells = sequence * k_sequence + kv_head * k_head + block * k_block + slot * k_row
    v_cells = sequence * v_sequence + kv_head * v_head + block * v_block + slot * v_row
    column, value_column = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    tl.store(k_ptr + k_cells[:, None] + column[None, :], k, mask=present[:, None] & (column < DIM)[None, :])
    tl.store(
        v_ptr + v_cells[:, None] + value_column[None, :],
        v,
        mask=present[:, None] & (value_column < VALUE_DIM)[None, :],
    )
