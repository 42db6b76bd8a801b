"""Executing the ``gumbel`` topology: attention over exactly position 0, the window and a row's own ball."""

import dataclasses
from typing import Literal

import torch

from llama_surgery.attention.executor import kernels_run
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.attention.impl.reference import masked_softmax
from llama_surgery.config import Backend, SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.gumbel.balls import TreeOrder, ball_mask, order_serves

#: Rows whose logits over all keys are held at once.
STRIP = 256


@dataclasses.dataclass(frozen=True)
class BallResult:
    """What :func:`attend_balls` returns.

    Attributes:
        out: (batch, heads, rows, value_dim), the queries' dtype.
        lse: (batch, heads, rows) log-sum-exp of the visible logits, float32 or float64.
        seen_pairs: (batch, heads) int64, (query, key) pairs that rows see.
        read_pairs: (batch, heads) int64, pairs of all rows of a tile with all keys of the blocks it reads, in
            part masked: what is multiplied. Blocks of window and diagonal count whole, so that it can exceed
            the causal pairs of a short text.
    """

    out: torch.Tensor
    lse: torch.Tensor
    seen_pairs: torch.Tensor
    read_pairs: torch.Tensor


def attend_balls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    balls: torch.Tensor,
    *,
    window: int,
    scale: float | None = None,
    order: TreeOrder | None = None,
    backend: Backend = "auto",
) -> BallResult:
    """Attention of a text's last rows over what :func:`llama_surgery.gumbel.balls.ball_mask` shows them.

    Args:
        queries: (batch, heads, rows, head_dim), rows at the last positions.
        keys: (batch, kv_heads, n, head_dim), all positions in order.
        values: (batch, kv_heads, n, value_dim).
        balls: (batch, heads, n) int64, the ball of every token, for each query head.
        window: Last positions that are always seen, the row's own counted.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        order: Of the first tokens, as many as :func:`llama_surgery.gumbel.balls.order_serves` asks for, so
            that not every step sorts; made here if None. Only the kernels look at it.
        backend: ``triton`` takes kernels that read a tile's blocks only and do not differentiate,
            ``reference`` a masked softmax over everything, ``auto`` the kernels on a GPU where they can run
            the call.

    Raises:
        SurgeryError: The order lacks tokens, or the backend asked for cannot run the call.
    """
    if order is not None and not order_serves(order, keys.shape[2], window):
        raise SurgeryError(
            f"the order holds {order.slots} of {keys.shape[2]} tokens: it may lack the last window={window}."
        )
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if ball_backend(backend, queries, keys, values) == "triton":
        from llama_surgery.gumbel import token_mask

        return BallResult(*token_mask.attend(queries, keys, values, balls, window, scale, order))
    return BallResult(*_plain(queries, keys, values, balls, window, scale))


def _plain(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    balls: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, pairs seen and read of :func:`attend_balls`, by a masked softmax over all keys."""
    (batch, kv_heads, count, _), rows = keys.shape, queries.shape[2]
    grouped, group_balls = (x.unflatten(1, (kv_heads, -1)).flatten(0, 1) for x in (queries, balls))
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    outs, lses, seen, read = [], [], torch.zeros_like(balls[..., 0]), 0
    for start in range(0, rows, STRIP):
        stop = min(start + STRIP, rows)
        end = count - rows + stop
        position = torch.arange(count - rows + start, end, device=queries.device)
        visible = ball_mask(group_balls[..., :end], position, window)
        q = grouped[:, :, start:stop]
        out, lse = masked_softmax(q, keys[:, :end], values[:, :end], visible, scale, None)
        outs.append(out.to(queries.dtype))
        lses.append(lse)
        seen = seen + visible.sum((-1, -2)).view_as(seen)
        read += (stop - start) * end
    out, lse = (torch.cat(x, 2).unflatten(0, (batch, kv_heads)).flatten(1, 2) for x in (outs, lses))
    return out, lse, seen, torch.full_like(seen, read)


def ball_backend(
    backend: Backend, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Literal["triton", "reference"]:
    """Who executes a call: the backend asked for, or the fastest that can.

    Raises:
        SurgeryError: It is no backend, or cannot run this call.
    """
    if backend not in ("auto", "triton", "reference"):
        raise SurgeryError(f"backend={backend!r}: balls are executed by 'auto', 'triton' or 'reference'.")

    def problem() -> str | None:
        from llama_surgery.attention.impl import triton

        # Balls have no tiles that a configuration could be at odds with: only tensors are looked at.
        found = triton.obstacle(SurgeryConfig(), queries, values, 1)
        if found is None and differentiable(queries, keys, values):
            found = "it does not differentiate balls; use torch.no_grad() or backend='reference'"
        return found

    return "triton" if kernels_run(backend, queries.device, problem)[0] else "reference"
