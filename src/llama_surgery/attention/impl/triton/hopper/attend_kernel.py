"""Attention on Hopper: two warpgroups multiply, each a tile of one head, and a warp loads for each of them.

It does what ``attend_kernel`` does, near field and listed pages in one loop. That kernel leaves the overlap
of loads, products and exponentials to two programs of a processor; here one program owns the processor, its
two halves take tiles until none are left, and each loads its next one while it computes. They share nothing,
since heads read pages of their own. Queries stay in registers, so that products of scores read shared memory
for keys alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from llama_surgery.attention.impl.triton.helpers import ENTRY, FLOOR, LN2, LOG2E
from llama_surgery.attention.impl.triton.hopper.helpers import (
    BLOCK,
    begin_fill,
    closed_chunks,
    fetch,
    fetch_page,
    first_slot,
    hand_out,
    in_pieces,
    make_ring,
    make_room,
    make_ticket,
    of_piece,
    products_with,
    release,
    take,
    wait_filled,
)

#: Rows of a tile.
TILE = gl.constexpr(64)


@gluon.jit
def _place(
    work, tiles, pieces_ptr, first_tile, dense_until,
    GROUP: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Of a unit of work: chooser, tile, its first query, begin of its near keys, and how many blocks of them
    every row sees whole. Behind those lies the block with the diagonal."""
    stream = work // (tiles * GROUP)
    rest = work % (tiles * GROUP)
    # Long rows first: none of them is left over in the end. Heads of a group read the same near keys in turn.
    tile = tiles - 1 - rest // GROUP
    q_first = of_piece(pieces_ptr, tile, 0, (first_tile + tile) * TILE)
    begin = closed_chunks(q_first, CHUNK, WINDOW, dense_until) * CHUNK
    return stream * GROUP + rest % GROUP, tile, q_first, begin, (q_first + 1 - begin) // BLOCK


@gluon.jit
def _pages(entries_ptr, counts_ptr, chooser, tile, tiles, capacity, FAR: gl.constexpr):
    """How many pages a tile reads, and where their entries are."""
    count = 0
    entries = 0
    if FAR:
        listed = chooser.to(gl.int64) * tiles + tile
        count = gl.load(counts_ptr + listed)
        entries = entries_ptr + listed * capacity
    return count, entries


@gluon.jit
def _load(
    half, q, near_k, near_v, far_k, far_v, blocks_ptr, block_slots, entries_ptr, counts_ptr, taken_ptr,
    q_room, ticket, key_ring, value_ring,
    choosers, tiles, capacity, pieces_ptr, start, near_start, first_tile, dense_until,
    GROUP: gl.constexpr, DIM: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    FAR: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    bytes_of_block: gl.constexpr = BLOCK * DIM * 2
    per: gl.constexpr = BLOCK // PAGE
    slabs: gl.constexpr = DIM // 64
    key_pages = key_ring[0]
    value_pages = value_ring[0]
    if FAR:
        key_pages = in_pieces(key_pages, far_k, KEY_STAGES * slabs * per)
        value_pages = in_pieces(value_pages, far_v, VALUE_STAGES * slabs * per)
    step = 0
    turn = 0
    work = gl.program_id(0) * 2 + half
    while work < choosers * tiles:
        chooser, tile, q_first, begin, whole = _place(
            work, tiles, pieces_ptr, first_tile, dense_until, GROUP, CHUNK, WINDOW
        )
        stream = chooser // GROUP
        origin = of_piece(pieces_ptr, tile, 1, start)
        near_first = of_piece(pieces_ptr, tile, 4, near_start)
        arrived = hand_out(ticket, turn, work)
        mbarrier.expect(arrived, TILE * DIM * 2)
        fetch(q, [chooser, q_first - origin, 0], arrived, q_room.index(half))
        turn += 1
        count, entries = _pages(entries_ptr, counts_ptr, chooser, tile, tiles, capacity, FAR)
        # The block with the diagonal comes first.
        for index in range(1 + whole):
            at = begin + gl.where(index == 0, whole, index - 1) * BLOCK - near_first
            room, full = begin_fill(key_ring, step, bytes_of_block, KEY_STAGES)
            fetch(near_k, [stream, at, 0], full, room)
            room, full = begin_fill(value_ring, step, bytes_of_block, VALUE_STAGES)
            fetch(near_v, [stream, at, 0], full, room)
            step += 1
        if FAR:
            for place in range(0, count, per):
                # Where a block has a page too few, the first one fills it: no row sees it.
                _, full = begin_fill(key_ring, step, bytes_of_block, KEY_STAGES)
                for page in gl.static_range(per):
                    entry = gl.load(entries + place + page, mask=place + page < count, other=0)
                    piece = step % KEY_STAGES * slabs * per + page
                    slot = first_slot(entry // ENTRY, blocks_ptr, block_slots, CHUNK, PAGE)
                    fetch_page(far_k, stream, slot, full, key_pages, piece, slabs, per)
                _, full = begin_fill(value_ring, step, bytes_of_block, VALUE_STAGES)
                for page in gl.static_range(per):
                    entry = gl.load(entries + place + page, mask=place + page < count, other=0)
                    piece = step % VALUE_STAGES * slabs * per + page
                    slot = first_slot(entry // ENTRY, blocks_ptr, block_slots, CHUNK, PAGE)
                    fetch_page(far_v, stream, slot, full, value_pages, piece, slabs, per)
                step += 1
        work = 2 * gl.num_programs(0) + gl.atomic_add(taken_ptr, 1)
    mbarrier.arrive(hand_out(ticket, turn, work), count=1)


@gluon.jit
def _weigh(products, total, top, factor):
    """A step of the online softmax: weights, their sum and maximum so far, what earlier weights shrink by."""
    new_top = gl.maximum(top, gl.max(products, 1) * factor)
    weights = gl.exp2(products * factor - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return weights, total * decay + gl.sum(weights, 1), new_top, decay


@gluon.jit
def _attend(
    half, q_room, ticket, key_ring, value_ring, entries_ptr, counts_ptr, sink_ptr, out_ptr, lse_ptr,
    out_chooser, out_row, lse_chooser,
    choosers, tiles, capacity, pieces_ptr, start, stop, first_tile, dense_until, factor,
    GROUP: gl.constexpr, DIM: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    FAR: gl.constexpr, SUMMARY: gl.constexpr, SINK: gl.constexpr, KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    # Output is stored by whole lines of 16 bytes.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_room.dtype
    row = gl.arange(0, TILE, layout=rows)
    row_wide = gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    nothing = gl.zeros([TILE, BLOCK], gl.float32, scores)
    step = 0
    turn = 0
    work = take(ticket, turn)
    while work < choosers * tiles:
        chooser, tile, q_first, begin, whole = _place(
            work, tiles, pieces_ptr, first_tile, dense_until, GROUP, CHUNK, WINDOW
        )
        origin = of_piece(pieces_ptr, tile, 1, start)
        low = of_piece(pieces_ptr, tile, 2, start)
        high = of_piece(pieces_ptr, tile, 3, stop)
        q = q_room.index(half).reshape([TILE, DIM]).load(gl.DotOperandLayout(0, scores, 2))
        release(ticket, 0, 1)
        turn += 1
        count, entries = _pages(entries_ptr, counts_ptr, chooser, tile, tiles, capacity, FAR)
        position = q_first + row
        live = (position >= low) & (position < high)
        position_wide = q_first + row_wide
        live_wide = (position_wide >= low) & (position_wide < high)
        lse_cells = lse_ptr + chooser.to(gl.int64) * lse_chooser + (position - origin).to(gl.int64)
        place = chooser.to(gl.int64) * out_chooser + (position_wide - origin).to(gl.int64) * out_row
        out_cells = out_ptr + place[:, None] + column[None, :]
        acc = gl.zeros([TILE, DIM], gl.float32, sums)
        top = gl.full([TILE], FLOOR, gl.float32, rows)
        total = gl.zeros([TILE], gl.float32, rows)
        if SINK:
            sink = gl.load(sink_ptr + (chooser + 0 * row))
            top = gl.maximum(sink.to(gl.float32) * LOG2E, FLOOR)
            total = total + 1.0
        if FAR and SUMMARY:  # noqa: SIM102 (the other condition is known at run time)
            if begin > 0:
                # The means of pages that rows do not see are a key of their own, whose value is their output.
                standing = gl.load(lse_cells, mask=live, other=float("-inf")) * LOG2E
                new_top = gl.maximum(top, standing)
                share = gl.exp2(standing - new_top)
                total = total * gl.exp2(top - new_top) + share
                top = new_top
                means = gl.load(out_cells, mask=live_wide[:, None], other=0.0).to(gl.float32)
                acc = gl.convert_layout(means, sums)
                acc = acc * gl.convert_layout(share, gl.SliceLayout(1, sums))[:, None]

        keys = wait_filled(key_ring, step, KEY_STAGES).reshape([BLOCK, DIM])
        products = warpgroup_mma_wait(0, [products_with(q, keys, nothing)])
        release(key_ring, step, KEY_STAGES)
        at = begin + whole * BLOCK + key
        visible = (at[None, :] <= position[:, None]) & (at < high)[None, :]
        products = gl.where(visible, products, float("-inf"))
        weights, total, top, decay = _weigh(products, total, top, factor)
        weights = gl.convert_layout(weights.to(dtype), factors)
        if FAR and SUMMARY:
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
        for index in range(1, 1 + whole + (count * PAGE + BLOCK - 1) // BLOCK):
            if FAR:
                page = (index - 1 - whole) * (BLOCK // PAGE) + key // PAGE
                absent = gl.where(index <= whole, 0, TILE) + 0 * key
                first = gl.load(entries + page, mask=(page < count) & (page >= 0), other=absent) % ENTRY
            keys = wait_filled(key_ring, step + 1, KEY_STAGES).reshape([BLOCK, DIM])
            products = products_with(q, keys, nothing)
            values = wait_filled(value_ring, step, VALUE_STAGES).reshape([BLOCK, DIM])
            acc = warpgroup_mma(weights, values, acc, is_async=True)
            products = warpgroup_mma_wait(1, [products])
            release(key_ring, step + 1, KEY_STAGES)
            if FAR:
                products = gl.where(row[:, None] >= first[None, :], products, float("-inf"))
            new_weights, total, top, decay = _weigh(products, total, top, factor)
            acc = warpgroup_mma_wait(0, [acc])
            release(value_ring, step, VALUE_STAGES)
            weights = gl.convert_layout(new_weights.to(dtype), factors)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
            step += 1
        values = wait_filled(value_ring, step, VALUE_STAGES).reshape([BLOCK, DIM])
        acc = warpgroup_mma_wait(0, [warpgroup_mma(weights, values, acc, is_async=True)])
        release(value_ring, step, VALUE_STAGES)
        step += 1

        lse = gl.where(total > 0.0, (top + gl.log2(total)) * LN2, float("-inf"))
        gl.store(lse_cells, lse, mask=live)
        inverse = 1.0 / gl.where(total > 0.0, total, 1.0)
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, sums))[:, None]
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), wide)
        gl.store(out_cells, out, mask=live_wide[:, None])
        work = take(ticket, turn)


@gluon.jit(
    do_not_specialize=[
        "choosers", "tiles", "capacity", "start", "stop", "near_start", "first_tile", "dense_until",
    ],
)  # fmt: skip
def hopper_attend_kernel(
    q, near_k, near_v, far_k, far_v, blocks_ptr, block_slots, entries_ptr, counts_ptr, taken_ptr,
    sink_ptr, out_ptr, lse_ptr, out_chooser, out_row, lse_chooser,
    choosers, tiles, capacity, pieces_ptr, start, stop, near_start, first_tile, dense_until, factor,
    GROUP: gl.constexpr, DIM: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr, PAGE: gl.constexpr,
    FAR: gl.constexpr, SUMMARY: gl.constexpr, SINK: gl.constexpr, KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    """Near field, then listed pages, of all tiles of a launch.

    A chooser is a head, GROUP of them to a stream of keys. Tiles are as long as blocks, so that one block
    of near keys has the diagonal; BLOCK is one page or several. ``q`` loads (1, TILE, DIM), near keys and
    values (1, BLOCK, DIM), far ones (1, PAGE, 64). With SUMMARY rows of tiles that have closed chunks go on
    from what is in ``out`` and ``lse``. ``taken`` int32 counts units of work handed out beyond each program's
    first two and begins at 0; ``factor`` is the scale of logits times log2 e. Lists, sinks, blocks, pieces
    and outputs are those of ``attend_kernel``. Grid: (as many programs as are to run at a time,).
    """
    q_room = make_room(q, 2)
    first_keys = make_ring(make_room(near_k, KEY_STAGES), KEY_STAGES, 1)
    first_values = make_ring(make_room(near_v, VALUE_STAGES), VALUE_STAGES, 1)
    first_ticket = make_ticket(1)
    second_keys = make_ring(make_room(near_k, KEY_STAGES), KEY_STAGES, 1)
    second_values = make_ring(make_room(near_v, VALUE_STAGES), VALUE_STAGES, 1)
    second_ticket = make_ticket(1)
    gl.warp_specialize(
        [
            (_attend, (
                0, q_room, first_ticket, first_keys, first_values, entries_ptr, counts_ptr, sink_ptr, out_ptr,
                lse_ptr, out_chooser, out_row, lse_chooser,
                choosers, tiles, capacity, pieces_ptr, start, stop, first_tile, dense_until, factor,
                GROUP, DIM, CHUNK, WINDOW, PAGE, FAR, SUMMARY, SINK, KEY_STAGES, VALUE_STAGES,
            )),
            (_attend, (
                1, q_room, second_ticket, second_keys, second_values, entries_ptr, counts_ptr, sink_ptr,
                out_ptr, lse_ptr, out_chooser, out_row, lse_chooser,
                choosers, tiles, capacity, pieces_ptr, start, stop, first_tile, dense_until, factor,
                GROUP, DIM, CHUNK, WINDOW, PAGE, FAR, SUMMARY, SINK, KEY_STAGES, VALUE_STAGES,
            )),
            (_load, (
                0, q, near_k, near_v, far_k, far_v, blocks_ptr, block_slots, entries_ptr, counts_ptr,
                taken_ptr, q_room, first_ticket, first_keys, first_values,
                choosers, tiles, capacity, pieces_ptr, start, near_start, first_tile, dense_until,
                GROUP, DIM, CHUNK, WINDOW, PAGE, FAR, KEY_STAGES, VALUE_STAGES,
            )),
            (_load, (
                1, q, near_k, near_v, far_k, far_v, blocks_ptr, block_slots, entries_ptr, counts_ptr,
                taken_ptr, q_room, second_ticket, second_keys, second_values,
                choosers, tiles, capacity, pieces_ptr, start, near_start, first_tile, dense_until,
                GROUP, DIM, CHUNK, WINDOW, PAGE, FAR, KEY_STAGES, VALUE_STAGES,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
