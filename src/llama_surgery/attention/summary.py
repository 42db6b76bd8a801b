"""What a row does not see of the far field, stood in for by means: one term for each ball or page."""

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
    """Attention over the pages that rows do not see, each ball a single key.

    A ball's logit is the log of what its keys are expected to weigh together
    (:meth:`~llama_surgery.topology.selection.Scorer.weights`), and its value is the mean of theirs. Where
    a row sees everything nothing needs standing in for: the log-sum-exp is -inf.

    Args:
        queries: (streams, heads, rows, head_dim), the rows of the plan's block.
        layout: At least the block's closed chunks, with mean values.
        plan: What the rows see.
        scorer: The layer's page score.
        config: Says what is summarised.

    Returns:
        Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows), the moments' dtype.
    """
    pages = plan.block.closed * config.pages_per_chunk
    scores = summary_logits(queries, layout.moments.first(pages * config.balls_per_page), scorer, config)
    seen = page_mask(plan, pages).unflatten(0, (len(queries), -1))  # (streams, heads or 1, rows, pages)
    if config.summary == "ball":
        seen = seen.repeat_interleave(config.balls_per_page, -1)
    scores = scores.masked_fill(seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1).clamp_min(torch.finfo(scores.dtype).min)).exp()
    assert layout.mean_values is not None
    means = layout.mean_values[:, : scores.shape[-1]].to(scores.dtype)
    return weights @ means.unsqueeze(1), lse


def summary_logits(
    queries: torch.Tensor, moments: Moments, scorer: Scorer, config: SurgeryConfig
) -> torch.Tensor:
    """Logits of all pages or balls, whichever are summarised, also of those that rows see.

    Args:
        queries: (streams, heads, rows, head_dim).
        moments: Of the balls of whole chunks.
        scorer: The layer's page score.
        config: Says what is summarised.

    Returns:
        (streams, heads, rows, pages or balls), the moments' dtype.
    """
    logits = scorer.weights(queries.flatten(1, 2), moments).unflatten(1, queries.shape[1:3])
    if config.summarised > config.ball_size:
        logits = logits.unflatten(-1, (-1, config.summarised // config.ball_size)).logsumexp(-1)
    if scorer.router is not None and scorer.router.summary is not None:
        logits = logits + scorer.router.summary.to(logits.dtype)[..., None, None]
    return logits
