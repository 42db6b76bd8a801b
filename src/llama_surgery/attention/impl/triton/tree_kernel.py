"""The kernels of ``directions="subspace"``: the whole tree of a chunk in one program.

Directions are found by a kernel of their own, as few of its programs fit a processor.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import EXACT, load_rows
from llama_surgery.attention.impl.triton.layout_kernels import split_places


@triton.jit
def _widest_column(a, b, c, d, ab, ac, ad, bc, bd, cd):
    """Column of the widest channel, the first of equals, of symmetric 4 × 4 matrices given entry by entry."""
    top, w, x, y, z = a, a, ab, ac, ad
    wider = b > top
    top = tl.where(wider, b, top)
    w, x, y, z = (
        tl.where(wider, ab, w), tl.where(wider, b, x), tl.where(wider, bc, y), tl.where(wider, bd, z),
    )  # fmt: skip
    wider = c > top
    top = tl.where(wider, c, top)
    w, x, y, z = (
        tl.where(wider, ac, w), tl.where(wider, bc, x), tl.where(wider, c, y), tl.where(wider, cd, z),
    )  # fmt: skip
    wider = d > top
    return (
        tl.where(wider, ad, w), tl.where(wider, bd, x), tl.where(wider, cd, y), tl.where(wider, d, z),
    )  # fmt: skip


@triton.jit
def _along_own_direction(p, q, r, s, present, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Where nodes' keys lie along their principal direction, (nodes, keys), from coordinates of that shape.

    As in ``topology.tree``, but that directions are not brought to length one: with the covariance at trace
    one they stay far from underflow.
    """
    p = tl.where(present, p - (tl.sum(p, 1) / SIZE)[:, None], 0.0)
    q = tl.where(present, q - (tl.sum(q, 1) / SIZE)[:, None], 0.0)
    r = tl.where(present, r - (tl.sum(r, 1) / SIZE)[:, None], 0.0)
    s = tl.where(present, s - (tl.sum(s, 1) / SIZE)[:, None], 0.0)
    a, b, c, d = tl.sum(p * p, 1), tl.sum(q * q, 1), tl.sum(r * r, 1), tl.sum(s * s, 1)
    unit = 1.0 / tl.maximum(a + b + c + d, 1e-30)
    a, b, c, d = a * unit, b * unit, c * unit, d * unit
    ab, ac, ad = tl.sum(p * q, 1) * unit, tl.sum(p * r, 1) * unit, tl.sum(p * s, 1) * unit
    bc, bd, cd = tl.sum(q * r, 1) * unit, tl.sum(q * s, 1) * unit, tl.sum(r * s, 1) * unit
    w, x, y, z = _widest_column(a, b, c, d, ab, ac, ad, bc, bd, cd)
    for _ in range(STEPS):
        w, x, y, z = (
            a * w + ab * x + ac * y + ad * z,
            ab * w + b * x + bc * y + bd * z,
            ac * w + bc * x + c * y + cd * z,
            ad * w + bd * x + cd * y + d * z,
        )
    return p * w[:, None] + q * x[:, None] + r * y[:, None] + s * z[:, None]


@triton.jit
def _split_level(
    here,
    there,
    order_here,
    order_there,
    base,
    plane,
    SIZE: tl.constexpr,
    NODES: tl.constexpr,
    ARITY: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Send every node's offsets, and unless it is the LAST level their coordinates, to its children."""
    node = tl.arange(0, triton.next_power_of_2(NODES))[:, None]
    place = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    present = (node < NODES) & (place < SIZE)
    cell = base + node * SIZE + place
    p = tl.load(here + cell, mask=present, other=0.0)
    q = tl.load(here + plane + cell, mask=present, other=0.0)
    r = tl.load(here + 2 * plane + cell, mask=present, other=0.0)
    s = tl.load(here + 3 * plane + cell, mask=present, other=0.0)
    offset = tl.load(order_here + cell, mask=present, other=0)
    along = _along_own_direction(p, q, r, s, present, SIZE, STEPS)
    target = base + node * SIZE + split_places(along, present, SIZE, ARITY)
    tl.store(order_there + target, offset, mask=present)
    if not LAST:
        tl.store(there + target, p, mask=present)
        tl.store(there + plane + target, q, mask=present)
        tl.store(there + 2 * plane + target, r, mask=present)
        tl.store(there + 3 * plane + target, s, mask=present)


@triton.jit
def subspace_kernel(
    keys_ptr,
    coordinates_ptr,
    key_stream,
    key_row,
    slots,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    STEPS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Where keys lie along the four leading principal directions of their chunk.

    ``coordinates`` (4, streams, slots) float32. Grid: (chunks, streams).
    """
    stream = tl.program_id(1).to(tl.int64)
    chunk_first = tl.program_id(0) * CHUNK
    plane = tl.num_programs(1).to(tl.int64) * slots
    keys = keys_ptr + stream * key_stream
    base = stream * slots + chunk_first

    channel = tl.arange(0, DIM_PAD)
    row = tl.arange(0, BLOCK)
    total = tl.zeros([DIM_PAD], tl.float32)
    gram = tl.zeros([DIM_PAD, DIM_PAD], tl.float32)
    # The next block is on its way, in registers, while one is multiplied.
    x = load_rows(keys, chunk_first + row, key_row, row < CHUNK, DIM, DIM_PAD, True)
    for block in range(BLOCK, CHUNK + BLOCK, BLOCK):
        ahead = load_rows(keys, chunk_first + block + row, key_row, block + row < CHUNK, DIM, DIM_PAD, True)
        total += tl.sum(x.to(tl.float32), 0)
        gram = tl.dot(tl.trans(x), x, gram, input_precision=EXACT)
        x = ahead
    mean = total / CHUNK
    gram -= total[:, None] * mean[None, :]
    diagonal = channel[:, None] == channel[None, :]
    spread = tl.sum(tl.where(diagonal, gram, 0.0), 1)
    # What equal keys leave is rounding error of their squares: it must not be blown up.
    trace, noise = tl.sum(spread, 0), 1e-6 * tl.sum(spread + total * mean, 0)
    unit = tl.maximum(tl.maximum(trace, noise), 1e-30)
    gram /= unit
    spread /= unit  # stays the covariance's diagonal

    for index in tl.static_range(0, 4):
        left = tl.sum(spread, 0)
        # The start, the covariance's column of the widest channel, is one step from that channel's axis.
        direction = (channel == tl.argmax(spread, 0)).to(tl.float32)
        scale = 1.0 / tl.maximum(left, ROUNDING)
        for _ in range(STEPS + 1):
            direction = tl.sum(gram * (direction * scale)[None, :], 1)
        length = tl.sqrt(tl.sum(direction * direction, 0))
        direction = tl.where(left > ROUNDING, direction / tl.maximum(length, 1e-30), 0.0)
        if index < 3:
            image = tl.sum(gram * direction[None, :], 1)
            image -= 0.5 * tl.sum(image * direction, 0) * direction
            gram -= direction[:, None] * image[None, :] + image[:, None] * direction[None, :]
            spread -= direction * image + image * direction
        if index == 0:
            first = direction
        elif index == 1:
            second = direction
        elif index == 2:
            third = direction
        else:
            fourth = direction

    tl.debug_barrier()  # else loads begin where the covariance still fills the registers
    wide: tl.constexpr = 2 * BLOCK
    row = tl.arange(0, wide)
    ahead = load_rows(keys, chunk_first + row, key_row, row < CHUNK, DIM, DIM_PAD, True)
    for block in range(0, CHUNK, wide):
        centred = ahead.to(tl.float32) - mean[None, :]
        present = block + wide + row < CHUNK
        ahead = load_rows(keys, chunk_first + block + wide + row, key_row, present, DIM, DIM_PAD, True)
        present = block + row < CHUNK
        cells = coordinates_ptr + base + block + row
        tl.store(cells, tl.sum(centred * first[None, :], 1), mask=present)
        tl.store(cells + plane, tl.sum(centred * second[None, :], 1), mask=present)
        tl.store(cells + 2 * plane, tl.sum(centred * third[None, :], 1), mask=present)
        tl.store(cells + 3 * plane, tl.sum(centred * fourth[None, :], 1), mask=present)


@triton.jit
def tree_kernel(
    order_ptr,
    other_order_ptr,
    coordinates_ptr,
    other_coordinates_ptr,
    slots,
    CHUNK: tl.constexpr,
    ARITY: tl.constexpr,
    LEVELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Tree order of a chunk from its keys' coordinates: ``topology.tree.tree_order`` with
    ``directions="subspace"``.

    ``order`` (streams, slots) int32 holds offsets in their chunks. They are written to it or, after an odd
    number of LEVELS, to ``other_order``. ``coordinates`` (4, streams, slots) float32 are those of
    ``subspace_kernel``; they and ``other_coordinates`` are overwritten. Grid: (chunks, streams).
    """
    plane = tl.num_programs(1).to(tl.int64) * slots
    base = tl.program_id(1).to(tl.int64) * slots + tl.program_id(0) * CHUNK
    here, there = coordinates_ptr, other_coordinates_ptr
    order_here, order_there = order_ptr, other_order_ptr
    for level in tl.static_range(0, LEVELS):
        tl.debug_barrier()
        _split_level(
            here, there, order_here, order_there, base, plane, CHUNK // ARITY**level, ARITY**level, ARITY,
            STEPS, level + 1 == LEVELS,
        )  # fmt: skip
        here, there = there, here
        order_here, order_there = order_there, order_here
