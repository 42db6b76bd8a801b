"""Runs the kernels over all rows of a call: a fixed number of launches, no host synchronisation."""

import dataclasses

import torch
import triton

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton.helpers import launching, pad_to_power, product_options
from llama_surgery.attention.impl.triton.hopper import launch as hopper
from llama_surgery.attention.impl.triton.job import Job, PooledLayout, Strip, make_job
from llama_surgery.attention.impl.triton.launch import described, heads_of_tile, placed_rows
from llama_surgery.attention.impl.triton.pieces import PieceTable
from llama_surgery.attention.impl.triton.prefill.attend_kernel import attend_kernel
from llama_surgery.attention.impl.triton.select.launch import select
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.attention.result import AttentionResult
from llama_surgery.topology.layout import Layout


def attend(
    call: AttentionCall,
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | PooledLayout | None,
    *,
    start: int,
    sink_logit: torch.Tensor | None = None,
    pieces: PieceTable | None = None,
    out: torch.Tensor | None = None,
    keep_lists: bool = False,
    trim_lists: bool = False,
) -> AttentionResult:
    """Attention of consecutive rows through the ``pages`` topology.

    Arguments and results are those of :func:`llama_surgery.attention.api.attend`, which checks them and
    whether these kernels run them. Pages are scored from moments in the queries' dtype.

    Args:
        pieces: Which of the rows, of several sequences, are computed; ``start`` is 0 then.
        out: (streams, heads, rows, value_dim), written, the last stride 1; a new one where None.
        keep_lists: Keep the page lists in the returned plans, for inspection.
        trim_lists: Keep no more of them than is valid, for a backward pass. Reads back a length per strip.
    """
    given = {"start": start, "sink_logit": sink_logit, "pieces": pieces}
    job = make_job(call, queries, near_keys, near_values, layout, **given)  # type: ignore[arg-type]
    streams, heads, rows, _ = queries.shape
    if out is None:
        out = queries.new_empty(streams, heads, rows, near_values.shape[-1])
    lse = queries.new_empty(streams, heads, rows, dtype=torch.float32)
    plans = []
    by_chooser = out.view(*job.queries.shape[:3], -1), lse.view(job.queries.shape[:3])
    with launching(queries):
        for strip in job.strips():
            plan = select(job, strip, *by_chooser) if strip.pages else None
            attend_strip(job, strip, plan, *by_chooser)
            if plan is not None:
                kept = plan if keep_lists or trim_lists else dataclasses.replace(plan, entries=None)
                plans.append(kept.trimmed() if trim_lists else kept)
    return AttentionResult(out, lse, plans)


def attend_strip(
    job: Job, strip: Strip, plan: TiledPlan | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Near field, then the plan's pages, of one strip; writes its rows of ``out`` and ``lse``.

    These are (choosers, heads of each, rows, value_dim) and (choosers, heads of each, rows). Where the job
    has means, what :func:`~.select.launch.select` wrote there is a part of the rows' attention.
    """
    if hopper.attends(job):
        hopper.attend_strip(job, strip, plan, out, lse)
        return
    choosers, heads = job.queries.shape[:2]
    constants = job.constants()
    tile_pad, dim_pad, value_pad = (constants[name] for name in ("TILE_PAD", "DIM_PAD", "VALUE_PAD"))
    heads_block = heads_of_tile(heads, job.tuning.rows, tile_pad)
    far_keys, far_values = job.near_keys, job.near_values
    blocks: tuple[torch.Tensor | None, int] = None, 0
    entries = counts = None
    if plan is not None:
        assert job.layout is not None
        far_keys, far_values = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (job.layout.keys, job.layout.values)
        )
        blocks, entries, counts = job.blocks, plan.entries, plan.counts
    page_pad = pad_to_power(job.config.page_size)
    block_near = job.tuning.block_near
    size = job.queries.element_size()
    room = job.tuning.shared - heads_block * tile_pad * dim_pad * size
    ahead = room // (page_pad * (dim_pad + value_pad) * size)
    attend_kernel[(strip.tiles * triton.cdiv(heads, heads_block), choosers)](
        job.queries,
        described(job.near_keys, block_near, dim_pad),
        described(job.near_values, block_near, value_pad),
        described(far_keys, page_pad, dim_pad),
        described(far_values, page_pad, value_pad),
        far_keys,
        far_values,
        *blocks,
        entries,
        counts,
        job.sink_logit,
        out,
        lse,
        *job.queries.stride()[:3],
        *far_keys.stride()[:2],
        *far_values.stride()[:2],
        *out.stride()[:3],
        *lse.stride()[:2],
        strip.tiles,
        strip.pages,
        *placed_rows(job, strip),
        job.scale,
        job.cap,
        HEADS_BLOCK=heads_block,
        PAGE_PAD=page_pad,
        PAGES_PER_STEP=max(1, job.tuning.keys_per_step // page_pad),
        BLOCK_NEAR=block_near,
        FAR=plan is not None,
        SUMMARY=job.means is not None,
        SINK=job.sink_logit is not None,
        num_warps=job.tuning.attend_warps,
        num_stages=max(1, min(job.tuning.attend_stages, ahead)),
        **constants,
        **product_options(job.queries),
    )
