"""The oracle: plain masked softmax over every closed page, readable in one sitting, float64-capable.

Slow on purpose: what a plan does not list is masked, not skipped.
"""

import torch

from llama_surgery.attention.impl.common import cap, compute_dtype, merge
from llama_surgery.topology.balls import ball_mask
from llama_surgery.topology.mask import page_mask
from llama_surgery.topology.plan import Plan

#: Rows whose logits over all keys are held at once.
STRIP = 256


def near_field(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.api.Backend.near_field`."""
    rows, count = queries.shape[2], keys.shape[1]
    visible = torch.ones(rows, count, dtype=torch.bool, device=queries.device).tril(count - rows)
    return _masked(queries, keys, values, visible, scale, softcap)


def far_field(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_size: int,
    plan: Plan,
    near: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.api.Backend.far_field`."""
    visible = page_mask(plan, keys.shape[1] // page_size).repeat_interleave(page_size, -1)
    far_out, far_lse = _masked(queries, keys, values, visible.unsqueeze(1), scale, softcap)
    return merge(*near, far_out, far_lse)


def attend_balls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    balls: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, pairs seen and read of :func:`llama_surgery.attention.balls.attend_balls`."""
    (batch, kv_heads, count, _), rows = keys.shape, queries.shape[2]
    grouped, group_balls = (x.unflatten(1, (kv_heads, -1)).flatten(0, 1) for x in (queries, balls))
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    outs, lses, seen, read = [], [], torch.zeros_like(balls[..., 0]), 0
    for start in range(0, rows, STRIP):
        stop = min(start + STRIP, rows)
        end = count - rows + stop
        position = torch.arange(count - rows + start, end, device=queries.device)
        visible = ball_mask(group_balls[..., :end], position, window)
        out, lse = _masked(grouped[:, :, start:stop], keys[:, :end], values[:, :end], visible, scale, softcap)
        outs.append(out.to(queries.dtype))
        lses.append(lse)
        seen = seen + visible.sum((-1, -2)).view_as(seen)
        read += (stop - start) * end
    out, lse = (torch.cat(x, 2).unflatten(0, (batch, kv_heads)).flatten(1, 2) for x in (outs, lses))
    return out, lse, seen, torch.full_like(seen, read)


def _masked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(queries.dtype)
    queries, keys, values = (x.to(dtype) for x in (queries, keys, values))
    logits = cap(queries @ keys.unsqueeze(1).transpose(-1, -2) * scale, softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    # A row that sees nothing has lse = -inf; its weights are zero, not NaN.
    weights = (logits - lse.unsqueeze(-1).clamp_min(torch.finfo(dtype).min)).exp()
    return weights @ values.unsqueeze(1), lse
