"""Launches what chooses the pages of a strip's rows and summarises the others."""

import functools
import math
from typing import NamedTuple

import torch
import triton

from llama_surgery.attention.impl.triton.helpers import bar_of, product_options
from llama_surgery.attention.impl.triton.job import Job, Strip
from llama_surgery.attention.impl.triton.launch import described, placed_rows
from llama_surgery.attention.impl.triton.select.scan_kernel import scan_kernel
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan


def select(job: Job, strip: Strip, out: torch.Tensor, lse: torch.Tensor) -> TiledPlan:
    """List the pages that the strip's rows open, and attend to means of the others.

    Where the job has means, rows with closed pages get what these come to, ``out`` (choosers, heads of each,
    rows, value_dim) and ``lse`` (choosers, heads of each, rows): :func:`prefill.attend_strip` goes on from
    there.
    """
    shape = Shape.of(job, strip)
    assert job.features is not None and job.layout is not None
    choosers, constants = job.queries.shape[0], job.constants()
    new = functools.partial(torch.empty, dtype=torch.int32, device=job.queries.device)
    entries = new(choosers, strip.tiles, strip.pages)
    counts, rows_seen = new(choosers, strip.tiles), new(choosers, strip.tiles)
    start = max(job.start, strip.first_tile * job.tile)
    stop = min(job.stop, (strip.first_tile + strip.tiles) * job.tile)
    mean, spread = job.features.chunk(2, -1)
    means, block = job.means, job.tuning.block_pages
    dim_pad, value_pad = constants["DIM_PAD"], constants["VALUE_PAD"]
    size = job.queries.element_size()
    room = job.tuning.shared - shape.rows * 2 * dim_pad * size
    ahead = room // (block * (2 * dim_pad + (0 if means is None else value_pad)) * size)
    registers = {"maxnreg": job.tuning.score_registers} if job.tuning.score_registers else {}
    scan_kernel[(shape.blocks, choosers)](
        job.queries,
        described(job.near_keys, job.tuning.block_near, dim_pad),
        described(mean, block, dim_pad),
        described(spread, block, dim_pad),
        None if means is None else described(means, block, value_pad),
        job.features,
        means,
        job.sink_logit,
        job.router.offset,
        job.router.mean_weight,
        job.router.variance_weight,
        job.router.summary,
        job.layout.sink_pages(job.config.page_size),
        new(choosers, shape.blocks, triton.cdiv(strip.pages, block), 4),
        new(choosers, shape.blocks, strip.pages),
        entries,
        counts,
        rows_seen,
        out,
        lse,
        *job.queries.stride()[:3],
        *job.features.stride()[:2],
        *(job.features if means is None else means).stride()[:2],
        *out.stride()[:3],
        *lse.stride()[:2],
        strip.tiles,
        strip.pages,
        *placed_rows(job, strip),
        job.scale,
        job.cap,
        *bar_of(job.config, job.tile),
        HEADS_BLOCK=shape.heads_block,
        TILES_BLOCK=shape.tiles_block,
        LOG2_PAGE=math.log2(job.config.page_size),
        BLOCK_NEAR=job.tuning.block_near,
        BLOCK_PAGES=block,
        SINK=job.sink_logit is not None,
        # A matrix tile longer than what was tuned for: threads hold as many of its rows as they did.
        num_warps=min(8, job.tuning.score_warps * max(1, shape.rows // job.tuning.score_rows)),
        num_stages=max(1, min(job.tuning.score_stages, ahead)),
        **registers,
        **constants,
        **product_options(job.queries),
    )
    return TiledPlan(start, stop, job.tile, counts, rows_seen, entries, pieces=job.pieces)


class Shape(NamedTuple):
    """How queries and heads are packed into matrix tiles: all heads of a chooser, some tiles."""

    tile_pad: int
    heads_block: int
    tiles_block: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a matrix tile."""
        return self.tile_pad * self.heads_block * self.tiles_block

    @classmethod
    def of(cls, job: Job, strip: Strip) -> "Shape":
        choosers, heads = job.queries.shape[:2]
        tile_pad, heads_pad = triton.next_power_of_2(job.tile), triton.next_power_of_2(heads)
        rows = job.tuning.score_rows
        # Fewer rows per program where there would not be two programs for each processor.
        while rows > 32 and choosers * strip.tiles * tile_pad * heads_pad < rows * 256:
            rows //= 2
        tiles_block = max(1, max(16, rows) // (tile_pad * heads_pad))
        tiles_block = min(tiles_block, triton.next_power_of_2(strip.tiles))
        # A matrix tile has at least 16 rows.
        heads_block = max(heads_pad, 16 // (tile_pad * tiles_block))
        return cls(tile_pad, heads_block, tiles_block, triton.cdiv(strip.tiles, tiles_block))
