"""Selection on Hopper in one launch: one warp loads, a warpgroup scores a tile's rows.

It does what ``totals_kernel`` and ``list_kernel`` do one after the other, for balls that are pages and rows
that are all scored. Queries stay in shared memory, so that a block's products are made while exponentials of
the last one are computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from llama_surgery.attention.impl.triton.helpers import ENTRY, FLOOR, LOG2E
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

#: Rows of a tile: queries x heads.
ROWS = gl.constexpr(128)


@gluon.jit
def _place(
    work, tiles, first_tile, stop, dense_until,
    TILE: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr, SUM_BALL: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Of a tile: stream, number, first query, closed chunks, and how many blocks there are of near keys, of
    balls that are summed and of pages: none where nothing is closed."""
    stream = work // tiles
    # Long rows first: none of them is left over in the end.
    tile = tiles - 1 - work % tiles
    q_first = (first_tile + tile) * TILE
    closed = closed_chunks(q_first, CHUNK, WINDOW, dense_until)
    near = (gl.minimum(q_first + TILE, stop) - closed * CHUNK + BLOCK - 1) // BLOCK
    near = gl.where(closed > 0, near, 0)
    balls = (closed * (CHUNK // SUM_BALL) + BLOCK - 1) // BLOCK
    return stream, tile, q_first, closed, near, balls, (closed * (CHUNK // PAGE) + BLOCK - 1) // BLOCK


@gluon.jit
def _fetch_balls(
    means, spreads, stream, block, ring, spread_room, step, BYTES: gl.constexpr, STAGES: gl.constexpr
):
    room, full = begin_fill(ring, step, BYTES, STAGES)
    fetch(means, [stream, block * BLOCK, 0], full, room)
    fetch(spreads, [stream, block * BLOCK, 0], full, spread_room.index(step % STAGES))


@gluon.jit
def _load(
    q, near_k, sum_means, sum_spreads, page_means, page_spreads, taken_ptr,
    ticket, q_ring, ring, spread_room, streams, tiles, start, stop, near_start, first_tile, dense_until,
    TILE: gl.constexpr, DIM: gl.constexpr, SPREAD_PAD: gl.constexpr, CHUNK: gl.constexpr,
    WINDOW: gl.constexpr, SUM_BALL: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    bytes_of_keys: gl.constexpr = BLOCK * DIM * 2
    bytes_of_balls: gl.constexpr = BLOCK * (DIM + SPREAD_PAD) * 2
    step = 0
    turn = 0
    q_turn = 0
    work = gl.program_id(0)
    while work < streams * tiles:
        stream, _, q_first, closed, near, balls, pages = _place(
            work, tiles, first_tile, stop, dense_until, TILE, CHUNK, WINDOW, SUM_BALL, PAGE
        )
        mbarrier.arrive(hand_out(ticket, turn, work), count=1)
        turn += 1
        begin = closed * CHUNK - near_start
        # As many near keys as there is room for come before the queries, which wait until the last tile's
        # are done with.
        early = gl.minimum(near, STAGES)
        for block in range(early):
            room, full = begin_fill(ring, step, bytes_of_keys, STAGES)
            fetch(near_k, [stream, begin + block * BLOCK, 0], full, room)
            step += 1
        if closed > 0:
            room, full = begin_fill(q_ring, q_turn, ROWS * DIM * 2, 1)
            fetch(q, [stream, 0, q_first - start, 0], full, room)
            q_turn += 1
        for block in range(early, near):
            room, full = begin_fill(ring, step, bytes_of_keys, STAGES)
            fetch(near_k, [stream, begin + block * BLOCK, 0], full, room)
            step += 1
        for block in range(balls):
            _fetch_balls(
                sum_means, sum_spreads, stream, block, ring, spread_room, step, bytes_of_balls, STAGES
            )
            step += 1
        for block in range(pages):
            _fetch_balls(
                page_means, page_spreads, stream, block, ring, spread_room, step, bytes_of_balls, STAGES
            )
            step += 1
        work = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1)
    mbarrier.arrive(hand_out(ticket, turn, work), count=1)


@gluon.jit
def _square(x):
    """Squares of pairs of bfloat16."""
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $1;", "=r,r", [x], gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _ones(mask):
    """Set bits of an int64."""
    return gl.inline_asm_elementwise("popc.b64 $0, $1;", "=r,l", [mask], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _sum_step(total, top, products, factor, more):
    """A step of the online log-sum-exp of ``products * factor + more``, in log2 units."""
    new_top = gl.maximum(top, gl.max(products, 1) * factor + more)
    weights = gl.exp2(products * factor - (new_top - more)[:, None])
    return total * gl.exp2(top - new_top) + gl.sum(weights, 1), new_top


@gluon.jit
def _list_step(
    scores, bar, row, block, pages, sink_page, entries, count, seen, low, high, TILE: gl.constexpr
):  # fmt: skip
    """List those of a block's pages that some row opens; returns their number and the rows that see them,
    each added to what was before."""
    first = gl.min(gl.where(scores > bar[None, :], row[None, :], TILE), 1)
    index = gl.arange(0, BLOCK, layout=first.type.layout)
    page = block * BLOCK + index
    first = gl.where(page == sink_page, 0, first)
    listed = (first < TILE) & (page < pages)
    # A page's place follows from the bits of those before it: one sum, where a scan would take several.
    bit = gl.full([BLOCK], 1, gl.int64, first.type.layout) << index
    mask = gl.sum(gl.where(listed, bit, 0), 0)
    gl.store(entries + count + _ones(mask & (bit - 1)), page * ENTRY + first, mask=listed)
    seen += gl.where(listed, gl.maximum(high - gl.maximum(first, low), 0), 0)
    return count + _ones(mask), seen


@gluon.jit
def _page_scores(queries, squares, ring, spread_room, step, nothing, DIM: gl.constexpr, STAGES: gl.constexpr):
    """Scores of a block of pages, pages down and rows across, in flight."""
    means = wait_filled(ring, step, STAGES).reshape([BLOCK, DIM])
    spreads = spread_room.index(step % STAGES).reshape([BLOCK, squares.shape[1]])
    return warpgroup_mma(
        spreads, squares.permute([1, 0]), products_with(means, queries, nothing), is_async=True
    )


@gluon.jit
def _score(
    ticket, q_ring, ring, spread_room, squares, member,
    sink_ptr, offset_ptr, sink_page_ptr, entries_ptr, counts_ptr, seen_ptr,
    streams, tiles, capacity, start, stop, first_tile, dense_until, scale, log2_bar,
    HEADS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr, SPREAD_PAD: gl.constexpr,
    CHUNK: gl.constexpr, WINDOW: gl.constexpr, SUM_BALL: gl.constexpr, LOG2_SUM_BALL: gl.constexpr,
    PAGE: gl.constexpr, LOG_PAGE: gl.constexpr, SINK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    across: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    pools: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPREAD_PAD, 16])
    down: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    rows: gl.constexpr = gl.SliceLayout(1, across)
    dtype: gl.constexpr = squares.dtype
    m = gl.arange(0, ROWS, layout=rows)
    key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, across))
    row_across = gl.arange(0, ROWS, layout=gl.SliceLayout(0, down)) % TILE
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, across)
    nothing_down = gl.zeros([BLOCK, ROWS], gl.float32, down)
    factor = scale * LOG2E
    step = 0
    turn = 0
    q_turn = 0
    work = take(ticket, turn)
    while work < streams * tiles:
        stream, tile, q_first, closed, _, balls, page_blocks = _place(
            work, tiles, first_tile, stop, dense_until, TILE, CHUNK, WINDOW, SUM_BALL, PAGE
        )
        release(ticket, turn, 1)
        turn += 1
        count = 0
        seen = gl.zeros([BLOCK], gl.int32, gl.SliceLayout(1, down))
        if closed > 0:
            queries = wait_filled(q_ring, q_turn, 1).reshape([ROWS, DIM])
            # What multiplies pooled variances: q², summed over the channels of each, with the scale in it.
            q = queries.load(gl.DotOperandLayout(0, pools, 2))
            pooled = gl.zeros([ROWS, SPREAD_PAD], gl.float32, pools)
            if dtype == gl.bfloat16:
                pooled = warpgroup_mma(_square(q), member.permute([1, 0]), pooled) * scale
            else:
                q = q.to(gl.float32)
                q = gl.minimum(q * q * scale, 6.0e4).to(dtype)
                pooled = warpgroup_mma(q, member.permute([1, 0]), pooled)
            squares.store(gl.minimum(pooled, 6.0e4).to(dtype))
            fence_async_shared()

            position = q_first + m % TILE
            head = m // TILE
            live = (head < HEADS) & (position >= start) & (position < stop)
            top = gl.full([ROWS], FLOOR, gl.float32, rows)
            total = gl.zeros([ROWS], gl.float32, rows)
            if SINK:
                sink = gl.load(sink_ptr + stream * HEADS + head, mask=head < HEADS, other=0.0)
                top = gl.maximum(sink.to(gl.float32) * LOG2E, FLOOR)
                total = total + 1.0

            whole = (q_first + 1 - closed * CHUNK) // BLOCK
            keys = wait_filled(ring, step, STAGES).reshape([BLOCK, DIM])
            products = warpgroup_mma_wait(0, [products_with(queries, keys, nothing)])
            for _ in range(whole):
                keys = wait_filled(ring, step + 1, STAGES).reshape([BLOCK, DIM])
                later = products_with(queries, keys, nothing)
                release(ring, step, STAGES)
                total, top = _sum_step(total, top, products, factor, 0.0)
                products = warpgroup_mma_wait(0, [later])
                step += 1
            release(ring, step, STAGES)
            step += 1
            at = (closed * CHUNK + whole * BLOCK + key)[None, :]
            products = gl.where((at <= position[:, None]) & (at < stop), products, float("-inf"))
            total, top = _sum_step(total, top, products, factor, 0.0)

            for block in range(balls):
                means = wait_filled(ring, step, STAGES).reshape([BLOCK, DIM])
                spreads = spread_room.index(step % STAGES).reshape([BLOCK, SPREAD_PAD])
                products = products_with(queries, means, nothing)
                products = warpgroup_mma(squares, spreads.permute([1, 0]), products, is_async=True)
                products = warpgroup_mma_wait(0, [products])
                release(ring, step, STAGES)
                step += 1
                there = block * BLOCK + key < closed * (CHUNK // SUM_BALL)
                products = gl.where(there[None, :], products, float("-inf"))
                total, top = _sum_step(total, top, products, factor, LOG2_SUM_BALL)

            bar = top + gl.log2(total) + log2_bar
            if offset_ptr is not None:
                bar += gl.load(offset_ptr + stream * HEADS + head, mask=live, other=0.0) * LOG2E
            # In the units that scores come in: divided by the scale.
            bar = gl.where(live, (bar / LOG2E - LOG_PAGE) / scale, float("inf"))
            bar = gl.convert_layout(bar, gl.SliceLayout(0, down))
            pages = closed * (CHUNK // PAGE)
            sink_page = gl.load(sink_page_ptr + stream)
            entries = entries_ptr + (stream.to(gl.int64) * tiles + tile) * capacity
            low = gl.maximum(start - q_first, 0)
            high = gl.minimum(stop - q_first, TILE)
            scores = warpgroup_mma_wait(
                0, [_page_scores(queries, squares, ring, spread_room, step, nothing_down, DIM, STAGES)]
            )
            for block in range(page_blocks - 1):
                later = _page_scores(queries, squares, ring, spread_room, step + 1, nothing_down, DIM, STAGES)
                release(ring, step, STAGES)
                count, seen = _list_step(
                    scores, bar, row_across, block, pages, sink_page, entries, count, seen, low, high, TILE
                )
                scores = warpgroup_mma_wait(0, [later])
                step += 1
            release(ring, step, STAGES)
            release(q_ring, q_turn, 1)
            step += 1
            q_turn += 1
            block = page_blocks - 1
            count, seen = _list_step(
                scores, bar, row_across, block, pages, sink_page, entries, count, seen, low, high, TILE
            )  # fmt: skip
        gl.store(counts_ptr + stream * tiles + tile, count)
        gl.store(seen_ptr + stream * tiles + tile, gl.sum(seen, 0))
        work = take(ticket, turn)


@gluon.jit(
    do_not_specialize=[
        "streams", "tiles", "capacity", "start", "stop", "near_start", "first_tile", "dense_until",
    ],
)  # fmt: skip
def hopper_select_kernel(
    q, near_k, sum_means, sum_spreads, page_means, page_spreads,
    sink_ptr, offset_ptr, sink_page_ptr, entries_ptr, counts_ptr, seen_ptr, taken_ptr,
    streams, tiles, capacity, start, stop, near_start, first_tile, dense_until, scale, log2_bar,
    HEADS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr, SPREAD: gl.constexpr,
    SPREAD_PAD: gl.constexpr, CHUNK: gl.constexpr, WINDOW: gl.constexpr, SUM_BALL: gl.constexpr,
    LOG2_SUM_BALL: gl.constexpr, PAGE: gl.constexpr, LOG_PAGE: gl.constexpr, SINK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Lists of the pages that a launch's tiles open, as ``list_kernel`` writes them.

    Row m of a tile is query ``m % TILE`` of head ``m // TILE``. Totals add up balls of SUM_BALL keys.
    Descriptors load (1, ROWS / TILE, TILE, DIM) queries and (1, BLOCK, DIM or SPREAD_PAD) of everything else;
    beyond SPREAD there are zeros. ``taken`` int32 counts tiles handed out beyond each program's first and
    begins at 0. Grid: (as many programs as are to run at a time,).
    """
    spread_room = make_room(page_spreads, STAGES)
    square_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, SPREAD_PAD], q.dtype)
    squares = gl.allocate_shared_memory(q.dtype, [ROWS, SPREAD_PAD], square_layout)
    # Which channel's square belongs to which pooled variance: ones and zeros.
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    channel = gl.arange(0, DIM, layout=gl.SliceLayout(0, lines)) % (DIM // 2) // (DIM // (2 * SPREAD))
    pool = gl.arange(0, SPREAD_PAD, layout=gl.SliceLayout(1, lines))
    member_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SPREAD_PAD, DIM], q.dtype)
    member = gl.allocate_shared_memory(
        q.dtype, [SPREAD_PAD, DIM], member_layout, (pool[:, None] == channel[None, :]).to(q.dtype)
    )
    fence_async_shared()
    ticket = make_ticket(1)
    q_ring = make_ring(make_room(q, 1), 1, 1)
    ring = make_ring(make_room(near_k, STAGES), STAGES, 1)
    gl.warp_specialize(
        [
            (_score, (
                ticket, q_ring, ring, spread_room, squares, member,
                sink_ptr, offset_ptr, sink_page_ptr, entries_ptr, counts_ptr, seen_ptr,
                streams, tiles, capacity, start, stop, first_tile, dense_until, scale, log2_bar,
                HEADS, TILE, DIM, SPREAD_PAD, CHUNK, WINDOW, SUM_BALL, LOG2_SUM_BALL, PAGE, LOG_PAGE, SINK,
                STAGES,
            )),
            (_load, (
                q, near_k, sum_means, sum_spreads, page_means, page_spreads, taken_ptr,
                ticket, q_ring, ring, spread_room,
                streams, tiles, start, stop, near_start, first_tile, dense_until,
                TILE, DIM, SPREAD_PAD, CHUNK, WINDOW, SUM_BALL, PAGE, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
