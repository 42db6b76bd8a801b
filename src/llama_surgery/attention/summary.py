"""What a row does not see of the far field, stood in for by means: one key for each page."""

import torch

from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.plan import Plan, page_mask
from llama_surgery.topology.selection import Scored, Scorer


def summary(scored: Scored, layout: Layout, plan: Plan, scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the pages that rows do not see, each a single key.

    Its logit is the log of what the page weighs, with a head's learned weight of summaries, its value the
    mean of its keys' values. Where a row sees everything, nothing stands in: the output is zero, and the
    log-sum-exp so low that it adds nothing to a row's.

    Args:
        scored: The plan's block, from :func:`~llama_surgery.topology.selection.score_pages`.
        layout: At least the block's closed chunks, with mean values.
        plan: What the rows see.
        scorer: The layer's page score.

    Returns:
        Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows), the weights' dtype.
    """
    weights, pages = scored.weights, scored.weights.shape[-1]
    seen = page_mask(plan, pages).unflatten(0, (len(weights), -1))  # (streams, heads or 1, rows, pages)
    # Of what all pages weigh together, each one's part: no exponential overflows, and none is computed twice.
    shares = (weights - scored.lse.unsqueeze(-1)).exp_().masked_fill(seen, 0)
    unseen = shares.sum(-1).clamp_min(torch.finfo(shares.dtype).tiny)
    assert layout.mean_values is not None
    out = shares @ layout.mean_values[:, :pages].to(shares.dtype).unsqueeze(1)
    lse = scored.lse + unseen.log()
    if scorer.router is not None and scorer.router.summary is not None:
        lse = lse + scorer.router.summary.to(lse.dtype)[..., None]
    return out / unseen.unsqueeze(-1), lse


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
