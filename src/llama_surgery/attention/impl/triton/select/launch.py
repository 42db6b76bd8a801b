"""Launches what lists the pages that a strip's rows open."""

import math

import torch

from llama_surgery.attention.impl.triton.job import Job, Strip, feature_parts
from llama_surgery.attention.impl.triton.launch import (
    ScoreShape,
    described,
    placed_rows,
    score_constants,
    scored_rows,
)
from llama_surgery.attention.impl.triton.select.list_kernel import list_kernel
from llama_surgery.attention.impl.triton.select.totals_kernel import totals_kernel
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan


def select(job: Job, strip: Strip) -> TiledPlan:
    """List the pages that the strip's rows open."""
    return list_pages(job, strip, row_totals(job, strip))


def row_totals(job: Job, strip: Strip) -> torch.Tensor:
    """Log-sum-exp, in log2 units, of the rows: (choosers, tiles, tile, heads of each) float32.

    Learned offsets are added to it: shares that are measured by it are to be compared with θ.
    """
    choosers, heads = job.queries.shape[:2]
    totals = job.queries.new_empty(choosers, strip.tiles, job.tile, heads, dtype=torch.float32)
    shape = ScoreShape.of(job, strip)
    assert job.features is not None
    head_dim, block_pages = job.queries.shape[-1], job.tuning.block_pages
    mean, spread = feature_parts(job.features, head_dim)
    constants = score_constants(job, shape)
    if job.config.variance_pool > 1:
        constants |= {"num_warps": job.tuning.totals_warps, "num_stages": job.tuning.totals_stages}
    totals_kernel[(shape.blocks * shape.head_blocks, choosers)](
        job.queries,
        described(job.near_keys, job.tuning.block_near, constants["DIM_PAD"]),
        described(mean, block_pages, constants["DIM_PAD"]),
        described(spread, block_pages, constants["SPREAD_PAD"]),
        job.sink_logit,
        job.router.offset,
        job.router.mean_weight,
        job.router.variance_weight,
        totals,
        *job.queries.stride()[:3],
        strip.tiles,
        *placed_rows(job, strip),
        job.scale,
        1.0 if job.softcap is None else job.softcap,
        **constants,
        TILES_BLOCK=shape.tiles_block,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=job.config.page_size,
        BLOCK_PAGES=block_pages,
        BLOCK_NEAR=job.tuning.block_near,
        SINK=job.sink_logit is not None,
    )
    return totals


def list_pages(job: Job, strip: Strip, totals: torch.Tensor) -> TiledPlan:
    """List pages by the rows' totals."""
    shape = ScoreShape.of(job, strip)
    assert job.features is not None
    plan, outputs = _new_plan(job, strip)
    constants, block = score_constants(job, shape), job.tuning.block_pages
    mean, spread = feature_parts(job.features, job.queries.shape[-1])
    list_kernel[(shape.blocks, job.queries.shape[0])](
        job.queries,
        described(mean, block, constants["DIM_PAD"]),
        described(spread, block, constants["SPREAD_PAD"]),
        job.router.mean_weight,
        job.router.variance_weight,
        totals,
        *outputs,
        plan.first,
        *job.queries.stride()[:3],
        strip.tiles,
        outputs[1].shape[-1],
        *scored_rows(job, strip),
        _log2_bar(job),
        **constants,
        TILES_BLOCK=shape.tiles_block,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=job.config.page_size,
        BLOCK_PAGES=block,
    )
    return plan


def _new_plan(job: Job, strip: Strip) -> tuple[TiledPlan, tuple[torch.Tensor, ...]]:
    """An unwritten plan, and what the kernels write: sink page (read), entries, counts, rows."""
    choosers = job.queries.shape[0]
    entries = job.queries.new_empty(choosers, strip.tiles, strip.pages, dtype=torch.int32)
    counts, rows_seen = (job.queries.new_empty(choosers, strip.tiles, dtype=torch.int32) for _ in range(2))
    start = max(job.start, strip.first_tile * job.tile)
    stop = min(job.stop, (strip.first_tile + strip.tiles) * job.tile)
    assert job.layout is not None
    sinks = job.layout.sink_pages(job.config.page_size)
    first = None if job.config.summary == "none" else torch.empty_like(entries, dtype=torch.uint8)
    plan = TiledPlan(start, stop, job.tile, counts, rows_seen, entries, first)
    return plan, (sinks, entries, counts, rows_seen)


def _log2_bar(job: Job) -> float:
    """log2 of the share that opens a page."""
    theta = job.config.theta_for(job.tile)
    return math.log2(theta) if theta > 0 else -math.inf
