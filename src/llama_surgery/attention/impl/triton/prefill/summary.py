"""Launches of what stands in for pages that rows do not see."""

import torch
import triton

from llama_surgery.attention.impl.triton.helpers import product_options
from llama_surgery.attention.impl.triton.job import Job, Strip, feature_parts
from llama_surgery.attention.impl.triton.launch import (
    ScoreShape,
    described,
    heads_of_tile,
    score_constants,
    scored_rows,
)
from llama_surgery.attention.impl.triton.prefill.summary_kernel import summary_kernel
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan


def means_for(job: Job) -> torch.Tensor | None:
    """Mean values of the pages that a call may summarise; None where it summarises nothing."""
    if job.layout is None or not job.config.summarises(job.tile):
        return None
    assert job.layout.mean_values is not None
    return job.layout.mean_values.to(job.queries.dtype)


def summarise_strip(
    job: Job, strip: Strip, plan: TiledPlan, means: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Add one key for every page that rows of a strip do not see to ``out`` and ``lse``.

    ``means`` are those of :func:`means_for`, ``out`` and ``lse`` those of :func:`prefill.attend_strip`.
    """
    features, config = job.features, job.config
    assert features is not None
    heads, head_dim, value_dim = job.queries.shape[1], job.queries.shape[-1], out.shape[-1]
    tile_pad = triton.next_power_of_2(job.tile)
    heads_block = heads_of_tile(heads, job.tuning.rows, tile_pad)
    constants = score_constants(job, ScoreShape.of(job, strip))
    block = max(job.tuning.block_pages, 16)  # a matrix tile has at least 16 columns
    value_pad = max(16, triton.next_power_of_2(value_dim))
    mean, spread = feature_parts(features, head_dim)
    summary_kernel[(strip.tiles * triton.cdiv(heads, heads_block), job.queries.shape[0])](
        job.queries,
        described(mean, block, constants["DIM_PAD"]),
        described(spread, block, constants["SPREAD_PAD"]),
        described(means, block, value_pad),
        plan.first,
        job.router.mean_weight,
        job.router.variance_weight,
        job.router.summary,
        out,
        lse,
        *job.queries.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        strip.tiles,
        strip.pages,
        *scored_rows(job, strip),
        GROUP=job.group,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        TILE=job.tile,
        TILE_PAD=tile_pad,
        VALUE_DIM=value_dim,
        VALUE_PAD=value_pad,
        CHUNK=config.chunk_size,
        WINDOW=config.window,
        PAGE=config.page_size,
        BLOCK_PAGES=block,
        **{name: constants[name] for name in ("DIM", "DIM_PAD", "SPREAD", "SPREAD_PAD", "CAP", "LOG2_PAGE")},
        num_warps=max(8, job.tuning.attend_warps),
        num_stages=1,
        **product_options(job.queries),
    )
