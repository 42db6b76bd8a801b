"""What a row does not see of the far field, stood in for by means: one key for each page."""

import torch

from llama_surgery.attention.impl.common import softmax_matmul
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.plan import Plan, page_mask
from llama_surgery.topology.selection import Scorer


def summary(
    weights: torch.Tensor, layout: Layout, plan: Plan, scorer: Scorer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the pages that rows do not see, each a single key.

    Its logit is the log of what the page weighs, with a head's learned weight of summaries, its value the
    mean of its keys' values. Where a row sees everything, nothing stands in: the output is zero, and the
    log-sum-exp so low that it adds nothing to a row's.

    Args:
        weights: (streams, heads, rows, pages) of the plan's block, from
            :func:`~llama_surgery.topology.selection.score_pages`.
        layout: At least the block's closed chunks, with mean values.
        plan: What the rows see.
        scorer: The layer's page score.

    Returns:
        Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows), the weights' dtype.
    """
    heads, _, pages = weights.shape[1:]
    seen = page_mask(plan, pages).unflatten(0, (len(weights), -1))  # (streams, heads or 1, rows, pages)
    logits = weights.masked_fill(seen, -torch.inf).flatten(1, 2)
    assert layout.mean_values is not None
    found = softmax_matmul(logits, layout.mean_values[:, :pages].to(logits.dtype))
    out, lse = (x.unflatten(1, (heads, -1)) for x in found)
    if scorer.router is not None and scorer.router.summary is not None:
        lse = lse + scorer.router.summary.to(lse.dtype)[..., None]
    return out, lse


def summary_logits(queries: torch.Tensor, moments: Moments, scorer: Scorer) -> torch.Tensor:
    """Log of what the keys of every page are expected to weigh together, seen or not.

    It is :class:`~llama_surgery.topology.selection.Scorer`'s weight, and a head's learned one of summaries.

    Args:
        queries: (streams, heads, rows, head_dim).
        moments: Of the pages of whole chunks.
        scorer: The layer's page score.

    Returns:
        (streams, heads, rows, pages), the moments' dtype.
    """
    weights = scorer(queries.flatten(1, 2), moments)[1].unflatten(1, queries.shape[1:3])
    if scorer.router is None or scorer.router.summary is None:
        return weights
    return weights + scorer.router.summary.to(weights.dtype)[..., None, None]
