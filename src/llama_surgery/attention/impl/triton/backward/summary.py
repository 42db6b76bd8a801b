"""Gradients through what stands in for pages that rows do not see: plain PyTorch, some rows at a time."""

from collections.abc import Iterator, Sequence

import torch

from llama_surgery.attention.impl.triton.job import Job, KeptMoments
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.attention.summary import summary_logits
from llama_surgery.topology.geometry import Block, query_blocks
from llama_surgery.topology.selection import Scorer

#: Logits of pages that are held at once, in elements.
ELEMENTS = 1 << 25


def summary_gradients(
    job: Job,
    plans: Sequence[TiledPlan],
    features: torch.Tensor,
    means: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    d_queries: torch.Tensor,
    *,
    by_features: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gradients of features and mean values; those of queries are added to ``d_queries``.

    A summary is a key of the row's softmax, its logit a function of the query and of the features. What the
    forward pass multiplied is multiplied again, in float32.

    Args:
        plans: What the rows see, with lists.
        features: (streams, pages, …), what the forward pass scored by.
        means: (streams, pages, value_dim), what it summarised by.
        d_out: (streams, heads, rows, value_dim).
        lse: (streams, heads, rows) of whole rows, summaries included.
        delta: (streams, heads, rows), see :func:`~.query_kernel.logit_gradients`.
        d_queries: (streams, heads, rows, head_dim).
        by_features: Are gradients of features asked for?
    """
    config = job.config
    queries = job.queries.view(d_queries.shape)
    scorer = Scorer(job.scale, job.softcap, job.router)
    d_features = torch.zeros_like(features, dtype=torch.float32) if by_features else None
    d_means = torch.zeros_like(means, dtype=torch.float32)
    for plan in plans:
        for block in _blocks(job, plan, lse.shape[:2].numel()):
            rows = slice(block.start - job.start, block.stop - job.start)
            pages = block.closed * config.pages_per_chunk
            q = queries[:, :, rows].float().requires_grad_()
            f = features[:, : block.closed * config.pages_per_chunk].float().requires_grad_(by_features)
            with torch.enable_grad():
                logits = summary_logits(q, KeptMoments(f, config.page_size), scorer)
            seen = plan.seen(block, pages).unflatten(0, (len(q), -1))
            weights = (logits.detach() - lse[:, :, rows, None]).exp().masked_fill(seen, 0.0)
            d_rows, m = d_out[:, :, rows].float(), means[:, None, :pages].float()
            d_logits = weights * (d_rows @ m.transpose(-1, -2) - delta[:, :, rows, None])
            d_q, *d_f = torch.autograd.grad(logits, (q, f) if by_features else (q,), d_logits)
            d_queries[:, :, rows] += d_q
            d_means[:, :pages] += weights.flatten(1, 2).transpose(1, 2) @ d_rows.flatten(1, 2)
            if d_features is not None:
                d_features[:, : f.shape[1]] += d_f[0]
    return None if d_features is None else d_features.to(features.dtype), d_means.to(means.dtype)


def _blocks(job: Job, plan: TiledPlan, heads: int) -> Iterator[Block]:
    """Rows of a plan that have closed chunks, cut so that logits of ``heads`` heads stay within ELEMENTS."""
    for block in query_blocks(plan.start, plan.stop, job.config, job.tile):
        if block.closed:
            step = max(1, ELEMENTS // (heads * block.closed * job.config.pages_per_chunk))
            for start in range(block.start, block.stop, step):
                yield Block(start, min(start + step, block.stop), block.closed)
