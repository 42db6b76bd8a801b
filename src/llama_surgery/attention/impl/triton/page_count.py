"""Fixed numbers of pages: the bar that a row's largest shares clear and no other does."""

import math

import torch
import triton

from llama_surgery.attention.impl.triton.helpers import LN2, product_options
from llama_surgery.attention.impl.triton.job import Job, Strip
from llama_surgery.attention.impl.triton.launch import (
    ScoreShape,
    page_constants,
    score_constants,
    scored_rows,
)
from llama_surgery.attention.impl.triton.share_kernel import share_kernel
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.router import PageRouter


def tile_bars(job: Job, strip: Strip, totals: torch.Tensor) -> torch.Tensor:
    """What log2 scores of the strip's scored rows must exceed for ``pages_per_row`` pages to be opened.

    Args:
        totals: (streams, tiles, slots, heads) of :func:`selection.row_totals`.

    Returns:
        The same shape.
    """
    level, (streams, heads) = job.steps[-1], job.queries.shape[:2]
    heads_pad = triton.next_power_of_2(heads)
    most = min(triton.next_power_of_2(job.slots), job.tuning.score_rows // heads_pad)
    slots_block = max(most, 16 // heads_pad, 1)
    constants = score_constants(job, ScoreShape.of(job, strip)) | page_constants(job, level)
    shared = ("SLOTS", "TILE", "DIM", "DIM_PAD", "SPREAD", "SPREAD_PAD", "CAP", "BALLS", "BALLS_PAD")
    shares = totals.new_full((*totals.shape[:3], strip.pages), -math.inf)
    share_kernel[(strip.tiles * triton.cdiv(job.slots, slots_block), streams)](
        job.queries,
        level.features,
        job.router.mean_weight,
        job.router.variance_weight,
        totals,
        shares,
        *job.queries.stride()[:3],
        *level.features.stride()[:2],
        strip.tiles,
        strip.pages,
        *scored_rows(job, strip),
        HEADS=heads,
        HEADS_PAD=heads_pad,
        SLOTS_BLOCK=slots_block,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=level.page,
        LOG2_BALL=math.log2(level.ball),
        BLOCK_PAGES=constants["BLOCK_BALLS"] // constants["BALLS_PAD"],
        **{name: constants[name] for name in shared},
        num_stages=1,
        **product_options(job.queries),
    )
    return totals + _between(shares, job.config.pages_per_row)[..., None]


def row_bars(
    config: SurgeryConfig,
    scores: torch.Tensor,
    sums: torch.Tensor,
    near: torch.Tensor,
    lengths: torch.Tensor,
    sink_logit: torch.Tensor | None,
    router: PageRouter,
) -> torch.Tensor:
    """Log2 of the share that opens ``pages_per_row`` pages, for rows of decode: (streams, queries) float32.

    Args:
        scores: (streams, pages, queries, heads) of the first kernel of decode, anything beyond closed pages.
        sums: (streams, splits, queries, heads) of the same kernel.
        near: (streams, splits, queries, heads) log-sum-exp of the near field's parts.
        lengths: (sequences,) int32, position of the first query.
        sink_logit: (streams, heads), or None.
        router: Learned corrections, one for every KV head.
    """
    streams, pages, queries, _ = scores.shape
    totals = (torch.cat((sums, near), 1) * LN2.value).logsumexp(1)
    if sink_logit is not None:
        totals = torch.logaddexp(totals, sink_logit[:, None].float())
    if router.offset is not None:
        totals = totals + router.offset.repeat(streams // len(router.offset), 1)[:, None]
    position = lengths.repeat_interleave(streams // len(lengths))[:, None] + torch.arange(
        queries, device=lengths.device
    )
    closed = (position - config.window).clamp_min(0) // config.chunk_size
    closed = torch.where(position < config.dense_until, 0, closed) * config.pages_per_chunk
    shares = (scores - totals[:, None] / LN2.value).amax(-1).transpose(1, 2)
    far = torch.arange(pages, device=scores.device) < closed[..., None]
    return _between(torch.where(far, shares, -math.inf), config.pages_per_row)


def _between(shares: torch.Tensor, count: int | None) -> torch.Tensor:
    """Halfway between the ``count``-th largest of (…, pages) and the next; -inf where there is no next."""
    assert count is not None
    if shares.shape[-1] <= count:
        return shares.new_full(shares.shape[:-1], -math.inf)
    largest = shares.topk(count + 1, dim=-1).values
    return 0.5 * (largest[..., -2] + largest[..., -1])
