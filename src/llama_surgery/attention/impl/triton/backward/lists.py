"""Which tiles read each page, from the pages that each tile reads."""

import torch
import triton

from llama_surgery.attention.impl.triton.backward.list_kernels import place_kernel, reader_kernel
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan

#: Tiles or places that the list kernels hold at once.
LIST_BLOCK = 1024


def transpose(plan: TiledPlan, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles read each page.

    Args:
        plan: Lists of (choosers, tiles).
        pages: Closed pages of its last tile.

    Returns:
        (choosers, pages, tiles) int32, left-packed ascending ``tile * ENTRY + first_open``;
        (choosers, pages) int32, how many of those are valid.
    """
    assert plan.entries is not None
    choosers, tiles, capacity = plan.entries.shape
    opened = torch.full((choosers, pages, tiles), -1, dtype=torch.int16, device=plan.counts.device)
    readers = plan.counts.new_empty(opened.shape)
    counts = plan.counts.new_empty(choosers, pages)
    place_kernel[(tiles, choosers)](
        plan.entries,
        plan.counts,
        opened,
        pages,
        capacity,
        BLOCK=min(LIST_BLOCK, triton.next_power_of_2(max(1, capacity))),
    )
    block = min(LIST_BLOCK, triton.next_power_of_2(tiles))
    reader_kernel[(pages, choosers)](opened, readers, counts, tiles, BLOCK=block)
    return readers, counts
