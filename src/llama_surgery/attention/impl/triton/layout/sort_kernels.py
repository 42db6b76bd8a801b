"""The kernels of layout: split the nodes of one level of the tree, then write keys in tree order."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import EXACT, load_rows


@triton.jit
def _node_offsets(order, first, NODE, BLOCK: tl.constexpr):
    """Block of a node's offsets from place ``first`` on (BLOCK,), their places, and which are real."""
    place = first + tl.arange(0, BLOCK)
    present = place < NODE
    return tl.load(order + place, mask=present, other=0), place, present


@triton.jit
def split_places(along, present, SIZE: tl.constexpr):
    """Where the SIZE keys of nodes go when these are split into two equal children, lower ones first:
    places in the node, (nodes, keys) int32. In a child keys keep their order.

    ``along`` (nodes, keys) float32 says which are lower, ties by place; where not ``present``, behind a
    node's keys, there is none.
    """
    # Integers in the order of the numbers; adding zero makes one of the two zeros.
    bits = (along + 0.0).to(tl.int32, bitcast=True)
    value = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # Three counts of at most SIZE are added up as one number.
    counts: tl.constexpr = tl.int32 if SIZE < 1 << 10 else tl.int64
    field: tl.constexpr = 10 if SIZE < 1 << 10 else 20
    mask: tl.constexpr = (1 << field) - 1
    # The largest bound with at most ``half`` values below it is the median. It is built two bits at a time,
    # from the highest on.
    half: tl.constexpr = SIZE // 2
    bound = tl.full([along.shape[0]], -2147483648, tl.int32)
    for step in range(0, 16):
        unit = 1 << (30 - 2 * step)
        below = (present & (value < (bound + unit)[:, None])).to(counts)
        below += (present & (value < (bound + 2 * unit)[:, None])).to(counts) << field
        below += (present & (value < (bound + 3 * unit)[:, None])).to(counts) << (2 * field)
        below = tl.sum(below, 1)
        higher = ((below & mask) <= half).to(tl.int32)
        higher += ((below >> field & mask) <= half).to(tl.int32)
        higher += ((below >> (2 * field)) <= half).to(tl.int32)
        bound += higher * unit
    less = present & (value < bound[:, None])
    equal = present & (value == bound[:, None])
    below = tl.sum(less.to(tl.int32), 1)
    lower = less | (equal & (below[:, None] + tl.cumsum(equal.to(tl.int32), 1) <= half))
    before = tl.cumsum(lower.to(tl.int32), 1)
    place = tl.arange(0, along.shape[1])[None, :]
    return tl.where(lower, before - 1, place + half - before)


@triton.jit
def project_kernel(
    keys_ptr,
    order_ptr,
    projections_ptr,
    key_stream,
    key_row,
    slots,
    CHUNK: tl.constexpr,
    NODE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Where the keys of every node of one level lie along its principal direction.

    ``order`` (streams, slots) int32 holds offsets in the chunk, node by node, ascending in each;
    ``projections`` (streams, slots) float32 goes with it. Grid: (nodes of a stream, streams). The
    arithmetic is that of ``topology.tree``; nodes of at most BLOCK keys stay in registers and do without the
    covariance matrix, X'(X v) in place of (X'X) v. Its start, the covariance's column of the widest channel,
    is one step from that channel's axis: hence one step more here. Directions are not brought to length one
    on the way, which would make all threads wait: with the covariance at trace one, v'C^k v of the widest
    channel's axis v is at least (v'Cv)^k, head_dim^-k or more, and so far from underflow.
    """
    stream = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * NODE
    chunk_first = first // CHUNK * CHUNK
    keys = keys_ptr + stream * key_stream
    order = order_ptr + stream * slots + first
    projections = projections_ptr + stream * slots + first

    channel = tl.arange(0, DIM_PAD)
    if NODE > BLOCK:
        # Many keys: their covariance is formed once, on the matrix units.
        total = tl.zeros([DIM_PAD], tl.float32)
        gram = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
        # The next block is on its way, in registers, while one is multiplied.
        offset, _, present = _node_offsets(order, 0, NODE, BLOCK)
        x = load_rows(keys, chunk_first + offset, key_row, present, DIM, DIM_PAD, True)
        for block in range(BLOCK, NODE + BLOCK, BLOCK):
            offset, _, present = _node_offsets(order, block, NODE, BLOCK)
            ahead = load_rows(keys, chunk_first + offset, key_row, present, DIM, DIM_PAD, True)
            total += tl.sum(x.to(tl.float32), 0)
            gram = tl.dot(tl.trans(x), x, gram, input_precision=EXACT)
            x = ahead
        mean = total / NODE
        gram -= total[:, None] * mean[None, :]
        spread = tl.sum(tl.where(channel[:, None] == channel[None, :], gram, 0.0), 1)
        # What equal keys leave is rounding error of their squares: it must not be blown up.
        trace, noise = tl.sum(spread, 0), 1e-6 * tl.sum(spread + total * mean, 0)
        gram /= tl.maximum(tl.maximum(trace, noise), 1e-30)
        direction = (channel == tl.argmax(spread, 0)).to(tl.float32)
        for _ in range(STEPS + 1):
            direction = tl.sum(gram * direction[None, :], 1)
        tl.debug_barrier()  # else loads begin where the covariance still fills the registers
        wide: tl.constexpr = 2 * BLOCK
        offset, place, present = _node_offsets(order, 0, NODE, wide)
        x = load_rows(keys, chunk_first + offset, key_row, present, DIM, DIM_PAD, True)
        offset, next_place, next_present = _node_offsets(order, wide, NODE, wide)
        for block in range(0, NODE, wide):
            ahead = load_rows(keys, chunk_first + offset, key_row, next_present, DIM, DIM_PAD, True)
            along = tl.sum((x.to(tl.float32) - mean[None, :]) * direction[None, :], 1)
            tl.store(projections + place, along, mask=present)
            x, place, present = ahead, next_place, next_present
            offset, next_place, next_present = _node_offsets(order, block + 2 * wide, NODE, wide)
    else:
        offset, place, present = _node_offsets(order, 0, NODE, BLOCK)
        x = load_rows(keys, chunk_first + offset, key_row, present, DIM, DIM_PAD, True).to(tl.float32)
        mean = tl.sum(x, 0) / NODE
        x = tl.where(present[:, None], x - mean[None, :], 0.0)
        spread = tl.sum(x * x, 0)
        scaled = x * tl.rsqrt(tl.maximum(tl.sum(spread, 0), 1e-30))
        direction = (channel == tl.argmax(spread, 0)).to(tl.float32)
        for _ in range(STEPS + 1):
            direction = tl.sum(scaled * tl.sum(scaled * direction[None, :], 1)[:, None], 0)
        tl.store(projections + place, tl.sum(x * direction[None, :], 1), mask=present)


@triton.jit
def split_kernel(order_ptr, children_ptr, projections_ptr, slots, SIZE: tl.constexpr, NODES: tl.constexpr):
    """Split a chunk's NODES nodes of SIZE keys into two equal children along what ``project_kernel`` wrote.

    ``order`` and ``projections`` are those of that kernel, ``children`` is as ``order``.
    Grid: (chunks, streams).
    """
    first = tl.program_id(1).to(tl.int64) * slots + tl.program_id(0) * (NODES * SIZE)
    node = tl.arange(0, triton.next_power_of_2(NODES))[:, None]
    place = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    present = (node < NODES) & (place < SIZE)
    cell = first + node * SIZE + place
    along = tl.load(projections_ptr + cell, mask=present, other=0.0)
    offset = tl.load(order_ptr + cell, mask=present, other=0)
    target = split_places(along, present, SIZE)
    tl.store(children_ptr + first + node * SIZE + target, offset, mask=present)


@triton.jit
def arrange_kernel(
    keys_ptr,
    values_ptr,
    order_ptr,
    keys_out_ptr,
    values_out_ptr,
    order_out_ptr,
    mean_ptr,
    variance_ptr,
    features_ptr,
    mean_values_ptr,
    sink_page_ptr,
    key_stream,
    key_row,
    value_stream,
    value_row,
    key_out_stream,
    value_out_stream,
    order_out_stream,
    feature_stream,
    mean_value_stream,
    slots,
    largest,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    PAGES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Write keys and values in tree order, the order in 16 bits, and what is known of pages.

    That is, where pointers are not None: mean and variance, contiguous (streams, pages, dim) float32; μ and
    ½·σ² at most ``largest`` side by side, as selection scores pages by; mean values; and the page of each
    stream that holds the first chunk's first key, (streams,) int32. Rows of outputs are contiguous.
    Grid: (pages of a stream / PAGES rounded up, streams).
    """
    stream = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, PAGES * PAGE_PAD)
    page = tl.program_id(0) * PAGES + row // PAGE_PAD
    slot = page * PAGE + row % PAGE_PAD
    present = (row % PAGE_PAD < PAGE) & (slot < slots)
    offset = tl.load(order_ptr + stream * slots + slot, mask=present, other=0)
    source = slot // CHUNK * CHUNK + offset
    k = load_rows(keys_ptr + stream * key_stream, source, key_row, present, DIM, DIM_PAD, True)
    v = load_rows(values_ptr + stream * value_stream, source, value_row, present, VALUE_DIM, VALUE_PAD, True)
    column, value_column = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    here = present[:, None] & (column < DIM)[None, :]
    tl.store(keys_out_ptr + stream * key_out_stream + slot[:, None] * DIM + column[None, :], k, mask=here)
    there = present[:, None] & (value_column < VALUE_DIM)[None, :]
    values_out = values_out_ptr + stream * value_out_stream
    tl.store(values_out + slot[:, None] * VALUE_DIM + value_column[None, :], v, mask=there)
    tl.store(order_out_ptr + stream * order_out_stream + slot, offset.to(tl.int16), mask=present)
    if sink_page_ptr is not None:
        first = present & (slot < CHUNK) & (offset == 0)
        tl.store(sink_page_ptr + stream + 0 * slot, page, mask=first)
    x = tl.reshape(k.to(tl.float32), [PAGES, PAGE_PAD, DIM_PAD])
    real = tl.reshape(present, [PAGES, PAGE_PAD])[:, :, None]
    mean = tl.sum(x, 1) / PAGE
    x = tl.where(real, x - mean[:, None, :], 0.0)
    variance = tl.sum(x * x, 1) / PAGE
    pages = slots // PAGE
    index = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    keep = (index < pages)[:, None] & (column < DIM)[None, :]
    if mean_ptr is not None:
        cell = (stream * pages + index)[:, None] * DIM + column[None, :]
        tl.store(mean_ptr + cell, mean, mask=keep)
        tl.store(variance_ptr + cell, variance, mask=keep)
    features = features_ptr + stream * feature_stream + index[:, None] * (2 * DIM) + column[None, :]
    dtype = features_ptr.dtype.element_ty
    tl.store(features, mean.to(dtype), mask=keep)
    tl.store(features + DIM, tl.minimum(variance * 0.5, largest).to(dtype), mask=keep)
    if mean_values_ptr is not None:
        held = tl.reshape(v.to(tl.float32), [PAGES, PAGE_PAD, VALUE_PAD])
        cells = mean_values_ptr + stream * mean_value_stream + index[:, None] * VALUE_DIM
        keep = (index < pages)[:, None] & (value_column < VALUE_DIM)[None, :]
        mean_value = (tl.sum(held, 1) / PAGE).to(mean_values_ptr.dtype.element_ty)
        tl.store(cells + value_column[None, :], mean_value, mask=keep)
