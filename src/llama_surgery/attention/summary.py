"""What a row does not see of the far field, stood in for by means: one key for each page."""

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.mask import page_mask
from llama_surgery.topology.plan import Plan
from llama_surgery.topology.selection import Scorer


def summary(
    queries: torch.Tensor,
    layout: Layout,
    plan: Plan,
    scorer: Scorer,
    config: SurgeryConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the pages that rows do not see, each a single key.

    Its logit is that of :func:`summary_logits`, its value the mean of its keys' values. Where a row sees
    everything nothing needs standing in for: the log-sum-exp is -inf.

    Args:
        queries: (streams, heads, rows, head_dim), the rows of the plan's block.
        layout: At least the block's closed chunks, with mean values.
        plan: What the rows see.
        scorer: The layer's page score.
        config: The topology.

    Returns:
        Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows), the moments' dtype.
    """
    pages = plan.block.closed * config.pages_per_chunk
    logits = summary_logits(queries, layout.moments.first(pages), scorer)
    seen = page_mask(plan, pages).unflatten(0, (len(queries), -1))  # (streams, heads or 1, rows, pages)
    logits = logits.masked_fill(seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1).clamp_min(torch.finfo(logits.dtype).min)).exp()
    assert layout.mean_values is not None
    return weights @ layout.mean_values[:, :pages].to(logits.dtype).unsqueeze(1), lse


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
    logits = scorer(queries.flatten(1, 2), moments)[1].unflatten(1, queries.shape[1:3])
    if scorer.router is not None and scorer.router.summary is not None:
        logits = logits + scorer.router.summary.to(logits.dtype)[..., None, None]
    return logits
