"""Lists turned around: from the pages that a tile reads to the tiles that read a page.

Through a matrix of pages by tiles, so that every list is in order of tiles: an atomic counter would be
shorter, and would add gradients in another order every time.
"""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import ENTRY


@triton.jit(do_not_specialize=["pages", "capacity"])
def place_kernel(entries_ptr, counts_ptr, opened_ptr, pages, capacity, BLOCK: tl.constexpr):
    """Write which pages a tile lists; one program per tile and chooser.

    ``opened`` (choosers, pages, tiles) int16 gets ``first_open`` where a tile lists a page; the rest is left
    as it is.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    chooser = tl.program_id(1).to(tl.int64)
    listed = chooser * tiles + tile
    count = tl.load(counts_ptr + listed)
    for block in range(0, count, BLOCK):
        place = block + tl.arange(0, BLOCK)
        entry = tl.load(entries_ptr + listed * capacity + place, mask=place < count, other=0)
        cell = (chooser * pages + entry // ENTRY) * tiles + tile
        tl.store(opened_ptr + cell, (entry % ENTRY).to(tl.int16), mask=place < count)


@triton.jit(do_not_specialize=["tiles"])
def reader_kernel(opened_ptr, readers_ptr, counts_ptr, tiles, BLOCK: tl.constexpr):
    """List the tiles that read a page; one program per page and chooser.

    ``opened`` is that of :func:`place_kernel`, -1 elsewhere. ``readers`` (choosers, pages, tiles) int32 gets
    ascending, left-packed ``tile * ENTRY + first_open``, ``counts`` (choosers, pages) int32 their number.
    """
    page = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count = tl.full([], 0, tl.int32)
    for block in range(0, tiles, BLOCK):
        tile = block + tl.arange(0, BLOCK)
        first = tl.load(opened_ptr + page * tiles + tile, mask=tile < tiles, other=-1).to(tl.int32)
        reads = first >= 0
        rank = count + tl.cumsum(reads.to(tl.int32), 0) - 1
        tl.store(readers_ptr + page * tiles + rank, tile * ENTRY + first, mask=reads)
        count += tl.sum(reads.to(tl.int32), 0)
    tl.store(counts_ptr + page, count)
