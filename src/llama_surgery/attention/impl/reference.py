"""The oracle: plain masked softmax over every closed page, readable in one sitting, float64-capable.

Slow on purpose: what a plan does not list is masked, not skipped.
"""

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.common import cap, compute_dtype, merge
from llama_surgery.topology.plan import Plan, page_mask


def near_field(
    call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.blocks.Backend.near_field`."""
    rows, count = queries.shape[2], keys.shape[1]
    visible = torch.ones(rows, count, dtype=torch.bool, device=queries.device).tril(count - rows)
    return masked_softmax(queries, keys, values, visible, call.scale, call.softcap)


def far_field(
    call: AttentionCall,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: Plan,
    near: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.blocks.Backend.far_field`."""
    size = call.config.page_size
    visible = page_mask(plan, keys.shape[1] // size).repeat_interleave(size, -1)
    visible = visible.unflatten(0, (len(keys), -1))  # (streams, heads or 1, rows, keys)
    far_out, far_lse = masked_softmax(queries, keys, values, visible, call.scale, call.softcap)
    return merge(*near, far_out, far_lse)


def masked_softmax(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of rows over the keys that a mask shows them, in at least float32.

    Args:
        queries: (streams, heads, rows, head_dim).
        keys: (streams, n, head_dim).
        values: (streams, n, value_dim).
        visible: (…, rows, n) bool, broadcast to streams and heads.
    """
    dtype = compute_dtype(queries.dtype)
    queries, keys, values = (x.to(dtype) for x in (queries, keys, values))
    logits = cap(queries @ keys.unsqueeze(1).transpose(-1, -2) * scale, softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    # A row that sees nothing has lse = -inf; its weights are zero, not NaN.
    weights = (logits - lse.unsqueeze(-1).clamp_min(torch.finfo(dtype).min)).exp()
    return weights @ values.unsqueeze(1), lse
