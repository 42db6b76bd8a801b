"""Launches what lists the pages that a strip's rows open."""

import itertools
import math

import torch
import triton

from llama_surgery.attention.impl.triton import hopper
from llama_surgery.attention.impl.triton.job import Job, Level, Strip, feature_parts
from llama_surgery.attention.impl.triton.launch import (
    ScoreShape,
    described,
    page_constants,
    placed_rows,
    score_constants,
    scored_rows,
)
from llama_surgery.attention.impl.triton.list_kernels import descend_kernel, list_kernel
from llama_surgery.attention.impl.triton.page_count import tile_bars
from llama_surgery.attention.impl.triton.select_kernels import totals_kernel
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.topology.selection import CANDIDATE_SHARE


def select(job: Job, strip: Strip) -> TiledPlan:
    """List the pages that the strip's rows open, in one launch where that can be."""
    if not hopper.selects(job):
        return list_pages(job, strip, row_totals(job, strip))
    plan, outputs = _new_plan(job, strip, job.steps[0])
    hopper.list_pages(job, strip, _log2_bar(job, last=True), *outputs)
    return plan


def row_totals(job: Job, strip: Strip, *, near: bool = True, far: bool = True) -> torch.Tensor:
    """Log-sum-exp, in log2 units, of the scored rows: (streams, tiles, slots, heads) float32.

    Learned offsets are added to it: shares that are measured by it are to be compared with θ.
    ``near`` and ``far`` leave a part out, for timing.
    """
    streams, heads = job.queries.shape[:2]
    totals = job.queries.new_empty(streams, strip.tiles, job.slots, heads, dtype=torch.float32)
    shape = ScoreShape.of(job, strip)
    level = job.total_level
    head_dim, block_balls = job.queries.shape[-1], job.tuning.block_balls
    mean, spread = feature_parts(level.features, head_dim)
    constants = score_constants(job, shape)
    if job.config.variance_pool > 1:
        constants |= {"num_warps": job.tuning.totals_warps, "num_stages": job.tuning.totals_stages}
    totals_kernel[(shape.blocks * shape.head_blocks, streams)](
        job.queries,
        described(job.near_keys, job.tuning.block_near, constants["DIM_PAD"]),
        described(mean, block_balls, constants["DIM_PAD"]),
        described(spread, block_balls, constants["SPREAD_PAD"]),
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
        BALL=level.ball,
        LOG2_BALL=math.log2(level.ball),
        BLOCK_BALLS=block_balls,
        BLOCK_NEAR=job.tuning.block_near,
        NEAR=near,
        FAR=far,
        SINK=job.sink_logit is not None,
    )
    return totals


def list_pages(job: Job, strip: Strip, totals: torch.Tensor) -> TiledPlan:
    """List pages by the rows' totals: flat, or coarse to fine, a launch for each level."""
    steps = job.steps
    if job.config.pages_per_row is not None:
        totals = tile_bars(job, strip, totals)
    plan = _list_level(job, strip, totals, steps[0], last=len(steps) == 1)
    for above, level in itertools.pairwise(steps):
        plan = _descend(job, strip, totals, above, level, plan, last=level is steps[-1])
    return plan


def _list_level(job: Job, strip: Strip, totals: torch.Tensor, level: Level, *, last: bool) -> TiledPlan:
    shape = ScoreShape.of(job, strip)
    plan, outputs = _new_plan(job, strip, level)
    constants = score_constants(job, shape) | page_constants(job, level)
    balls, balls_pad, block = (constants[name] for name in ("BALLS", "BALLS_PAD", "BLOCK_BALLS"))
    features = []
    for part, pad in zip(
        feature_parts(level.features, job.queries.shape[-1]), ("DIM_PAD", "SPREAD_PAD"), strict=True
    ):
        if balls == balls_pad:
            features.append(described(part, block, constants[pad]))
        else:  # pages one by one, each padded to a power of two
            by_page = part.unflatten(1, (-1, balls))
            features.append(described(by_page, block // balls_pad, balls_pad, constants[pad]))
    list_kernel[(shape.blocks, job.queries.shape[0])](
        job.queries,
        *features,
        job.router.mean_weight,
        job.router.variance_weight,
        totals,
        *outputs,
        plan.first,
        *job.queries.stride()[:3],
        strip.tiles,
        outputs[1].shape[-1],
        *scored_rows(job, strip),
        _log2_bar(job, last=last),
        **constants,
        TILES_BLOCK=shape.tiles_block,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=level.page,
    )
    return plan


def _descend(
    job: Job, strip: Strip, totals: torch.Tensor, above: Level, level: Level, coarse: TiledPlan, *, last: bool
) -> TiledPlan:
    shape = ScoreShape.of(job, strip)._replace(tiles_block=1)
    plan, outputs = _new_plan(job, strip, level)
    assert coarse.entries is not None
    fan = above.page // level.page
    constants = page_constants(job, level)
    fan_pad = triton.next_power_of_2(fan)
    constants["BLOCK_BALLS"] = max(int(constants["BLOCK_BALLS"]), fan_pad * int(constants["BALLS_PAD"]))
    # A tile alone may have fewer rows than a matrix tile.
    heads_block = max(shape.heads_block, 16 // shape.slots_pad)
    descend_kernel[(strip.tiles, job.queries.shape[0])](
        job.queries,
        level.features,
        job.router.mean_weight,
        job.router.variance_weight,
        totals,
        outputs[0],
        coarse.entries,
        coarse.counts,
        *outputs[1:],
        *job.queries.stride()[:3],
        *level.features.stride()[:2],
        strip.tiles,
        coarse.entries.shape[-1],
        outputs[1].shape[-1],
        *scored_rows(job, strip),
        _log2_bar(job, last=last),
        **score_constants(job, shape._replace(heads_block=heads_block)),
        **constants,
        FAN=fan,
        FAN_PAD=fan_pad,
    )
    return plan


def _new_plan(job: Job, strip: Strip, level: Level) -> tuple[TiledPlan, tuple[torch.Tensor, ...]]:
    """An unwritten plan, and what the kernels of a level write: sink page (read), entries, counts, rows."""
    streams = job.queries.shape[0]
    capacity = strip.pages * job.config.page_size // level.page
    entries = job.queries.new_empty(streams, strip.tiles, capacity, dtype=torch.int32)
    counts, rows_seen = (job.queries.new_empty(streams, strip.tiles, dtype=torch.int32) for _ in range(2))
    start = max(job.start, strip.first_tile * job.tile)
    stop = min(job.stop, (strip.first_tile + strip.tiles) * job.tile)
    assert job.layout is not None
    sinks = job.layout.sink_pages(level.page)
    first = None if job.config.summary == "none" else torch.empty_like(entries, dtype=torch.uint8)
    plan = TiledPlan(start, stop, job.tile, counts, rows_seen, entries, first)
    return plan, (sinks, entries, counts, rows_seen)


def _log2_bar(job: Job, *, last: bool) -> float:
    """log2 of the share that opens a page or, above the last level, makes a candidate."""
    if job.config.pages_per_row is not None:
        return 0.0  # a row's bar is in its totals
    theta = job.config.theta_for(job.tile) * (1.0 if last else CANDIDATE_SHARE)
    return math.log2(theta) if theta > 0 else -math.inf
