"""Pieces of the kernels for Hopper, which are written in Gluon: rings of buffers that one warp fills.

A ring is a tuple of a room (STAGES, …) in shared memory and two mbarriers for each of its buffers: *full*
completes when a block has arrived, *free* when all readers have said that they are done. Step n of the one
who fills and of those who read is in buffer n % STAGES; whether a barrier has completed is told by the parity
of n // STAGES.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from llama_surgery.attention.impl.triton import helpers

#: Keys of a block.
BLOCK = gl.constexpr(64)

# Names that changed between Triton 3.6 and 3.9.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

closed_chunks = gluon.jit(helpers.closed_chunks.fn)


@gluon.jit
def of_piece(pieces_ptr, tile, FIELD: gl.constexpr, given):
    """The helper of that name for any GPU, whose load is not Gluon's."""
    if pieces_ptr is None:
        return given
    else:
        return gl.load(pieces_ptr + tile * 8 + FIELD)


@gluon.jit
def first_slot(page, blocks_ptr, block_slots, CHUNK: gl.constexpr, PAGE: gl.constexpr):
    """The helper of that name for any GPU, whose load is not Gluon's."""
    if blocks_ptr is None:
        return page * PAGE
    else:
        per_chunk: gl.constexpr = CHUNK // PAGE
        block = gl.load(blocks_ptr + page // per_chunk).to(gl.int32)
        return block * block_slots + page % per_chunk * PAGE


@gluon.jit
def make_room(descriptor, COUNT: gl.constexpr):
    """COUNT buffers in shared memory for what a descriptor loads."""
    shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005 (Gluon knows no stars)
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def fetch_page(descriptor, stream, slot, full, room, place, SLABS: gl.constexpr, PER: gl.constexpr):
    """Load the keys or values of a page, a slab of 64 channels at a time: so a block lies in shared memory.

    ``room`` holds (PAGE, 64) pieces, ``place`` is the one of the page's first slab.
    """
    for slab in gl.static_range(SLABS):
        fetch(descriptor, [stream, slot, slab * 64], full, room.index(place + slab * PER))


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def in_pieces(room, descriptor, COUNT: gl.constexpr):
        """The same memory as COUNT smaller buffers, one for each of what a descriptor loads."""
        shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005
        return room.reinterpret(descriptor.dtype, shape, descriptor.layout)

else:

    @gluon.jit
    def in_pieces(room, descriptor, COUNT: gl.constexpr):
        """The same memory as COUNT smaller buffers, one for each of what a descriptor loads."""
        shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005
        return room._reinterpret(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def make_ring(room, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring around a room of STAGES buffers, each read by READERS partitions."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=READERS)
    return room, full, free


@gluon.jit
def begin_fill(ring, step, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until a step's buffer is free and announce what will arrive there; returns buffer and barrier."""
    room, full, free = ring
    stage = step % STAGES
    mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    return room.index(stage), full.index(stage)


@gluon.jit
def wait_filled(ring, step, STAGES: gl.constexpr):
    """Wait for a step's block; returns its buffer."""
    room, full, _ = ring
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    return room.index(stage)


@gluon.jit
def release(ring, step, STAGES: gl.constexpr):
    """Say that every warp of this partition is done with a step's buffer."""
    barrier()
    mbarrier.arrive(ring[2].index(step % STAGES), count=1)


@gluon.jit
def make_ticket(READERS: gl.constexpr):
    """A ring of one number: what the partitions are to do next."""
    return make_ring(
        gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0])), 1, READERS
    )


@gluon.jit
def hand_out(ticket, turn, work):
    """Write down what is to be done next, once the last number is read; whoever calls completes *full*."""
    room, full, free = ticket
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(free.index(0), (turn & 1) ^ 1)
    room.store(gl.full([1], work, gl.int32, one))
    barrier()
    return full.index(0)


@gluon.jit
def take(ticket, turn):
    """Wait for what is to be done next."""
    room, full, _ = ticket
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(0), turn & 1)
    return gl.max(room.load(one), 0)


@gluon.jit
def products_with(rows, block, nothing):
    """``rows @ block.T`` of a block (BLOCK, dim) in shared memory, in flight."""
    return warpgroup_mma(rows, block.permute([1, 0]), nothing, use_acc=False, is_async=True)
