"""Runs the kernels over all rows of a call: a fixed number of launches, no host synchronisation."""

import dataclasses
import itertools
import math

import torch
import triton

from llama_surgery.attention.impl.triton import hopper
from llama_surgery.attention.impl.triton.attend_kernel import attend_kernel
from llama_surgery.attention.impl.triton.helpers import device_of, product_options
from llama_surgery.attention.impl.triton.job import (
    Job,
    Level,
    Strip,
    feature_parts,
    make_job,
)
from llama_surgery.attention.impl.triton.launch import (
    ScoreShape,
    described,
    heads_of_tile,
    page_constants,
    score_constants,
    scored_rows,
)
from llama_surgery.attention.impl.triton.list_kernels import descend_kernel, list_kernel
from llama_surgery.attention.impl.triton.page_count import tile_bars
from llama_surgery.attention.impl.triton.select_kernels import totals_kernel
from llama_surgery.attention.impl.triton.summary import means_for, summarise_strip
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import query_blocks
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import CANDIDATE_SHARE


@dataclasses.dataclass(frozen=True)
class TiledResult:
    """What :func:`attend` returns; the fields of ``api.AttentionResult`` with tiled plans."""

    out: torch.Tensor
    lse: torch.Tensor
    plans: list[TiledPlan]
    near_pairs: int
    causal_pairs: int


def attend(
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | None,
    *,
    config: SurgeryConfig,
    start: int,
    tile: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    router: PageRouter | None = None,
    keep_lists: bool = False,
) -> TiledResult:
    """Attention of consecutive rows through the ``pages`` (or ``dense``) topology.

    Arguments and results are those of :func:`llama_surgery.attention.api.attend`, which checks them.
    Pages are scored from moments in the queries' dtype.

    Args:
        keep_lists: Keep the page lists in the returned plans, for inspection.

    Raises:
        SurgeryError: A dtype, tile or rule that these kernels do not run.
    """
    job = make_job(
        queries,
        near_keys,
        near_values,
        layout,
        config=config,
        start=start,
        tile=tile,
        scale=scale,
        softcap=softcap,
        sink_logit=sink_logit,
        router=router,
    )
    streams, heads, rows, _ = queries.shape
    out = queries.new_empty(streams, heads, rows, near_values.shape[-1])
    lse = queries.new_empty(streams, heads, rows, dtype=torch.float32)
    plans = []
    means = means_for(job)
    with device_of(queries):
        for strip in job.strips():
            plan = None
            if strip.pages:
                plan = select(job, strip)
                kept = plan if keep_lists else dataclasses.replace(plan, entries=None)
                plans.append(dataclasses.replace(kept, first=None))
            attend_strip(job, strip, plan, out, lse)
            if plan is not None and means is not None:
                summarise_strip(job, strip, plan, means, out, lse)
    near_pairs = sum(
        _triangle(b.stop - b.closed * config.chunk_size) - _triangle(b.start - b.closed * config.chunk_size)
        for b in query_blocks(job.start, job.stop, config, job.tile)
    )
    return TiledResult(out, lse, plans, near_pairs, _triangle(job.stop) - _triangle(job.start))


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
        job.start,
        job.stop,
        job.near_start,
        strip.first_tile,
        job.dense_until,
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


def attend_strip(
    job: Job,
    strip: Strip,
    plan: TiledPlan | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    page_bias: torch.Tensor | None = None,
) -> None:
    """Near field, then the plan's pages, of one strip; writes its rows of ``out`` and ``lse``.

    ``page_bias`` (streams, tiles, listed, heads, tile) float32, contiguous, is added to listed pages' logits.
    """
    if page_bias is None and hopper.attends(job):
        hopper.attend_strip(job, strip, plan, out, lse)
        return
    streams, heads = job.queries.shape[:2]
    tile_pad = triton.next_power_of_2(job.tile)
    heads_block = heads_of_tile(heads, job.tuning.rows, tile_pad)
    far_keys, far_values = job.near_keys, job.near_values
    entries = counts = None
    if plan is not None:
        assert job.layout is not None
        far_keys, far_values = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (job.layout.keys, job.layout.values)
        )
        entries, counts = plan.entries, plan.counts
    page_pad = max(16, triton.next_power_of_2(job.config.page_size))
    head_dim, value_dim = job.queries.shape[-1], job.near_values.shape[-1]
    dim_pad, value_pad = (max(16, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    block_near = job.tuning.block_near
    size = job.queries.element_size()
    room = job.tuning.shared - heads_block * tile_pad * dim_pad * size
    ahead = room // (page_pad * (dim_pad + value_pad) * size)
    attend_kernel[(strip.tiles * triton.cdiv(heads, heads_block), streams)](
        job.queries,
        described(job.near_keys, block_near, dim_pad),
        described(job.near_values, block_near, value_pad),
        described(far_keys, page_pad, dim_pad),
        described(far_values, page_pad, value_pad),
        far_keys,
        far_values,
        entries,
        counts,
        job.sink_logit,
        page_bias,
        out,
        lse,
        *job.queries.stride()[:3],
        *far_keys.stride()[:2],
        *far_values.stride()[:2],
        *out.stride()[:3],
        *lse.stride()[:2],
        strip.tiles,
        strip.pages,
        job.start,
        job.stop,
        job.near_start,
        strip.first_tile,
        job.dense_until,
        job.scale,
        1.0 if job.softcap is None else job.softcap,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        TILE=job.tile,
        TILE_PAD=tile_pad,
        DIM=head_dim,
        DIM_PAD=dim_pad,
        VALUE_DIM=value_dim,
        VALUE_PAD=value_pad,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=job.config.page_size,
        PAGE_PAD=page_pad,
        PAGES_PER_STEP=1 if page_bias is not None else max(1, job.tuning.keys_per_step // page_pad),
        BLOCK_NEAR=block_near,
        FAR=plan is not None,
        SINK=job.sink_logit is not None,
        CAP=job.softcap is not None,
        num_warps=job.tuning.attend_warps,
        num_stages=max(1, min(job.tuning.attend_stages, ahead)),
        **product_options(job.queries),
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
