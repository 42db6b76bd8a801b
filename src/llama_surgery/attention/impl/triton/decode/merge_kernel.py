"""The last kernel of decode: merge what programs found."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import FLOOR, LN2, LOG2E


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
    tally_ptr,
    lengths_ptr,
    parts,
    far_splits,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    FAR_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SINK: tl.constexpr,
    TALLY: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Merge partial results by their log-sum-exp. Grid: (heads * queries, streams), one program a row.

    Writes out (streams, heads, queries, VALUE_DIM) and lse (streams, heads, queries) in natural units, and
    the sums of counts, opened and read (streams, queries). With TALLY, these are also added to
    tally (2, KV_HEADS) int64. With ADVANCE the queries are added to the sequences' lengths, which no program
    of this kernel reads for anything else.
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
    # A row that only pads the batch saw nothing; NaN stays NaN.
    total = tl.where(total == 0.0, 1.0, total)
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
        if TALLY and FAR_PAD > 0:
            kv_head = stream % KV_HEADS
            tl.atomic_add(tally_ptr + kv_head, tl.cast(opened, tl.int64))
            tl.atomic_add(tally_ptr + KV_HEADS + kv_head, tl.cast(read, tl.int64))
    if ADVANCE:
        one = (tl.program_id(0) == 0) & (stream % KV_HEADS == 0)
        length_ptr = lengths_ptr + stream // KV_HEADS
        tl.store(length_ptr, tl.load(length_ptr, mask=one, other=0) + ROWS, mask=one)
