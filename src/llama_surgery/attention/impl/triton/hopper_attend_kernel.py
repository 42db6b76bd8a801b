"""Attention on Hopper: one warp loads, two warpgroups multiply, each half of a tile's rows.

It does what ``attend_kernel`` does, near field and listed pages in one loop. That kernel leaves the overlap
of loads, products and exponentials to two programs of a processor; here one program owns the processor, takes
tiles until none are left, and loads the next one's while it computes. Queries stay in registers, so that
products of scores read shared memory for keys alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from llama_surgery.attention.impl.triton.helpers import ENTRY, FLOOR, LN2, LOG2E
from llama_surgery.attention.impl.triton.hopper_helpers import (
    BLOCK,
    begin_fill,
    closed_chunks,
    fetch,
    hand_out,
    make_ring,
    make_room,
    make_ticket,
    products_with,
    release,
    take,
    wait_filled,
)

#: Rows of a warpgroup.
HALF = gl.constexpr(64)


@gluon.jit
def _place(
    work, tiles, first_tile, dense_until, HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr, TILE: gl.constexpr,
    CHUNK: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Of a unit of work: stream, first head, tile, its first query, begin of its near keys, and how many
    blocks of them every row sees whole. Behind those lies the block with the diagonal."""
    head_blocks: gl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    stream = work // (tiles * head_blocks)
    rest = work % (tiles * head_blocks)
    # Long rows first: none of them is left over in the end.
    tile = tiles - 1 - rest // head_blocks
    q_first = (first_tile + tile) * TILE
    begin = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * CHUNK
    return stream, rest % head_blocks * HEADS_BLOCK, tile, q_first, begin, (q_first + 1 - begin) // BLOCK


@gluon.jit
def _blocks(entries_ptr, counts_ptr, stream, tile, tiles, capacity, whole, FAR: gl.constexpr):
    """How many blocks a tile reads, and where the entry of block 0 would be, had near blocks entries too."""
    blocks = 1 + whole
    entries = 0
    if FAR:
        listed = stream.to(gl.int64) * tiles + tile
        blocks += gl.load(counts_ptr + listed)
        entries = entries_ptr + listed * capacity - 1 - whole
    return blocks, entries


@gluon.jit
def _load(
    q, near_k, near_v, far_k, far_v, entries_ptr, counts_ptr, taken_ptr, q_room, ticket, key_ring, value_ring,
    streams, tiles, capacity, start, near_start, first_tile, dense_until,
    HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    CHUNK: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    bytes_of_block: gl.constexpr = BLOCK * DIM * 2
    units = streams * tiles * ((HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK)
    step = 0
    turn = 0
    work = gl.program_id(0)
    while work < units:
        stream, head, tile, q_first, begin, whole = _place(
            work, tiles, first_tile, dense_until, HEADS, HEADS_BLOCK, TILE, CHUNK, WINDOW
        )
        arrived = hand_out(ticket, turn, work)
        mbarrier.expect(arrived, 2 * HALF * DIM * 2)
        for half in gl.static_range(2):
            fetch(
                q, [stream, head + half * (HEADS_BLOCK // 2), q_first - start, 0], arrived, q_room.index(half)
            )
        turn += 1
        blocks, entries = _blocks(entries_ptr, counts_ptr, stream, tile, tiles, capacity, whole, FAR)
        # The block with the diagonal comes first.
        for index in range(blocks):
            near = index <= whole
            at = begin + gl.where(index == 0, whole, index - 1) * BLOCK - near_start
            if FAR:
                entry = gl.load(entries + index, mask=index > whole, other=0)
                at = gl.where(near, at, entry // ENTRY * BLOCK)
            room, full = begin_fill(key_ring, step, bytes_of_block, STAGES)
            fetch(near_k, [stream, at, 0], full, room, pred=near)
            if FAR:
                fetch(far_k, [stream, at, 0], full, room, pred=index > whole)
            room, full = begin_fill(value_ring, step, bytes_of_block, STAGES)
            fetch(near_v, [stream, at, 0], full, room, pred=near)
            if FAR:
                fetch(far_v, [stream, at, 0], full, room, pred=index > whole)
            step += 1
        work = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1)
    mbarrier.arrive(hand_out(ticket, turn, work), count=1)


@gluon.jit
def _weigh(products, total, top, factor, seen):
    """A step of the online softmax: weights, their running sum and maximum, what earlier weights shrink by.

    Where a row has not ``seen`` the block, its weights are 0.
    """
    peak = gl.where(seen, gl.max(products, 1) * factor, FLOOR)
    new_top = gl.maximum(top, peak)
    shift = gl.where(seen, new_top, float("inf"))
    weights = gl.exp2(products * factor - shift[:, None])
    decay = gl.exp2(top - new_top)
    return weights, total * decay + gl.sum(weights, 1), new_top, decay


@gluon.jit
def _attend(
    half, q_room, ticket, key_ring, value_ring, entries_ptr, counts_ptr, sink_ptr, out_ptr, lse_ptr,
    out_stream, out_head, out_row, lse_stream, lse_head,
    streams, tiles, capacity, start, stop, first_tile, dense_until, factor,
    HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    CHUNK: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr, SINK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    # Output is stored by whole lines of 16 bytes.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_room.dtype
    m = gl.arange(0, HALF, layout=rows)
    m_wide = gl.arange(0, HALF, layout=gl.SliceLayout(1, wide))
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    nothing = gl.zeros([HALF, BLOCK], gl.float32, scores)
    units = streams * tiles * ((HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK)
    step = 0
    turn = 0
    work = take(ticket, turn)
    while work < units:
        stream, first_head, tile, q_first, begin, whole = _place(
            work, tiles, first_tile, dense_until, HEADS, HEADS_BLOCK, TILE, CHUNK, WINDOW
        )
        first_head += half * (HEADS_BLOCK // 2)
        q = q_room.index(half).reshape([HALF, DIM]).load(gl.DotOperandLayout(0, scores, 2))
        release(ticket, 0, 1)
        turn += 1
        blocks, entries = _blocks(entries_ptr, counts_ptr, stream, tile, tiles, capacity, whole, FAR)
        row = m % TILE
        position = q_first + row
        head = first_head + m // TILE
        acc = gl.zeros([HALF, DIM], gl.float32, sums)
        top = gl.full([HALF], FLOOR, gl.float32, rows)
        total = gl.zeros([HALF], gl.float32, rows)
        if SINK:
            sink = gl.load(sink_ptr + stream * HEADS + head, mask=head < HEADS, other=0.0)
            top = gl.maximum(sink.to(gl.float32) * LOG2E, FLOOR)
            total = total + 1.0

        keys = wait_filled(key_ring, step, STAGES).reshape([BLOCK, DIM])
        products = warpgroup_mma_wait(0, [products_with(q, keys, nothing)])
        release(key_ring, step, STAGES)
        at = begin + whole * BLOCK + key
        visible = (at[None, :] <= position[:, None]) & (at < stop)[None, :]
        products = gl.where(visible, products, float("-inf"))
        weights, total, top, _ = _weigh(products, total, top, factor, row >= 0)
        weights = gl.convert_layout(weights.to(dtype), factors)
        first = 0
        for index in range(1, blocks):
            if FAR:
                first = gl.load(entries + index, mask=index > whole, other=0) % ENTRY
            keys = wait_filled(key_ring, step + 1, STAGES).reshape([BLOCK, DIM])
            products = products_with(q, keys, nothing)
            values = wait_filled(value_ring, step, STAGES).reshape([BLOCK, DIM])
            acc = warpgroup_mma(weights, values, acc, is_async=True)
            products = warpgroup_mma_wait(1, [products])
            release(key_ring, step + 1, STAGES)
            new_weights, total, top, decay = _weigh(products, total, top, factor, row >= first)
            acc = warpgroup_mma_wait(0, [acc])
            release(value_ring, step, STAGES)
            weights = gl.convert_layout(new_weights.to(dtype), factors)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
            step += 1
        values = wait_filled(value_ring, step, STAGES).reshape([BLOCK, DIM])
        acc = warpgroup_mma_wait(0, [warpgroup_mma(weights, values, acc, is_async=True)])
        release(value_ring, step, STAGES)
        step += 1

        live = (head < HEADS) & (position >= start) & (position < stop)
        lse = gl.where(total > 0.0, (top + gl.log2(total)) * LN2, float("-inf"))
        place = stream.to(gl.int64) * lse_stream + head.to(gl.int64) * lse_head
        gl.store(lse_ptr + place + (position - start).to(gl.int64), lse, mask=live)
        inverse = 1.0 / gl.where(total > 0.0, total, 1.0)
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, sums))[:, None]
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), wide)
        head = first_head + m_wide // TILE
        position = q_first + m_wide % TILE
        live = (head < HEADS) & (position >= start) & (position < stop)
        place = stream.to(gl.int64) * out_stream + head.to(gl.int64) * out_head
        place += (position - start).to(gl.int64) * out_row
        gl.store(out_ptr + place[:, None] + column[None, :], out, mask=live[:, None])
        work = take(ticket, turn)


@gluon.jit(
    do_not_specialize=[
        "streams", "tiles", "capacity", "start", "stop", "near_start", "first_tile", "dense_until",
    ],
)  # fmt: skip
def hopper_attend_kernel(
    q, near_k, near_v, far_k, far_v, entries_ptr, counts_ptr, taken_ptr, sink_ptr, out_ptr, lse_ptr,
    out_stream, out_head, out_row, lse_stream, lse_head,
    streams, tiles, capacity, start, stop, near_start, first_tile, dense_until, factor,
    HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    CHUNK: gl.constexpr, WINDOW: gl.constexpr, FAR: gl.constexpr, SINK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Near field, then listed pages of BLOCK keys, of all tiles of a launch.

    Row m of a warpgroup is query ``m % TILE`` of its head ``m // TILE``; TILE divides BLOCK, so that one
    block of near keys has the diagonal. ``q`` loads (1, HEADS_BLOCK / 2, TILE, DIM), keys and values
    (1, BLOCK, DIM). ``taken`` int32 counts units of work handed out beyond each program's first and begins
    at 0; ``factor`` is the scale of logits times log2 e. Lists, sinks and
    outputs are those of ``attend_kernel``. Grid: (as many programs as are to run at a time,).
    """
    q_room = make_room(q, 2)
    key_ring = make_ring(make_room(near_k, STAGES), STAGES, 2)
    value_ring = make_ring(make_room(near_v, STAGES), STAGES, 2)
    ticket = make_ticket(2)
    gl.warp_specialize(
        [
            (_attend, (
                0, q_room, ticket, key_ring, value_ring, entries_ptr, counts_ptr, sink_ptr, out_ptr, lse_ptr,
                out_stream, out_head, out_row, lse_stream, lse_head,
                streams, tiles, capacity, start, stop, first_tile, dense_until, factor,
                HEADS, HEADS_BLOCK, TILE, DIM, CHUNK, WINDOW, FAR, SINK, STAGES,
            )),
            (_attend, (
                1, q_room, ticket, key_ring, value_ring, entries_ptr, counts_ptr, sink_ptr, out_ptr, lse_ptr,
                out_stream, out_head, out_row, lse_stream, lse_head,
                streams, tiles, capacity, start, stop, first_tile, dense_until, factor,
                HEADS, HEADS_BLOCK, TILE, DIM, CHUNK, WINDOW, FAR, SINK, STAGES,
            )),
            (_load, (
                q, near_k, near_v, far_k, far_v, entries_ptr, counts_ptr, taken_ptr,
                q_room, ticket, key_ring, value_ring,
                streams, tiles, capacity, start, near_start, first_tile, dense_until,
                HEADS, HEADS_BLOCK, TILE, DIM, CHUNK, WINDOW, FAR, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
