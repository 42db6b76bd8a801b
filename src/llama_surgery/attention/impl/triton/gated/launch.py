"""Near field, and far field with a bias for every row, head and page, both differentiable.

What an operated layer multiplies is chosen; here everything is multiplied, weighted by what the bias leaves
of it, so that there is a gradient by which a choice can be learned.
"""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton.backward.gradients import Forward, States, gradients
from llama_surgery.attention.impl.triton.gated.kernels import (
    gated_kernel,
    gated_key_kernel,
    gated_query_kernel,
)
from llama_surgery.attention.impl.triton.helpers import launching, pad_to_power, product_options
from llama_surgery.attention.impl.triton.job import make_job
from llama_surgery.attention.impl.triton.prefill.launch import attend_strip
from llama_surgery.config import SurgeryConfig

#: Bytes of the keys of a step, which are 64 at most.
STEP_BYTES = 16384


def obstacle(config: SurgeryConfig) -> str | None:
    """Why the kernels of this package cannot run a topology that the others run, or None."""
    for name in ("tile", "page_size"):
        size = getattr(config, name)
        if size & (size - 1) or size < 16:
            return f"{name}={size} is no power of two of at least 16"
    return None


def near_field(
    call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows of a text to their near fields.

    Args:
        call: How, without a softcap.
        queries: (streams, heads, n, head_dim), positions from 0 on.
        keys: (streams, n, head_dim).
        values: (streams, n, value_dim).

    Returns:
        (streams, heads, n, value_dim), the queries' dtype, and log-sum-exps (streams, heads, n) float32.
    """
    return _Near.apply(call, queries, keys, values)


def far_field(
    call: AttentionCall,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows to all keys of their closed chunks, each logit with the bias of its page.

    Args:
        call: How, without a softcap.
        queries: (streams, heads, rows, head_dim), from position ``start`` on.
        keys: (streams, slots, head_dim), full chunks in tree order.
        values: (streams, slots, value_dim), alike.
        bias: (streams, heads, rows, pages) float32, in nats: of the first pages at least those that are
            closed for the last row. Others are not read.
        start: A multiple of the tile.

    Returns:
        (streams, heads, rows, value_dim) and log-sum-exps (streams, heads, rows), float32; zeros and a number
        of less than -1e29 for rows without closed chunks.
    """
    return _Far.apply(call, queries, keys, values, bias, start)


class _Near(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        job = make_job(call, queries, keys, values, None, start=0)
        out = queries.new_empty(*queries.shape[:3], values.shape[-1])
        lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
        by_chooser = out.view(*job.queries.shape[:3], -1), lse.view(job.queries.shape[:3])
        with launching(queries):
            attend_strip(job, job.whole()._replace(pages=0), None, *by_chooser)
        ctx.call = call
        ctx.save_for_backward(queries, keys, values, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
        queries, keys, values, out, lse = ctx.saved_tensors
        states = States(queries, keys, values, None, None, None, None, None, out, lse)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        needed = [*ctx.needs_input_grad[1:], *(False,) * 5]
        with launching(queries):
            return None, *gradients(Forward(ctx.call, 0, ()), states, d_out, d_lse, needed)[:3]


class _Far(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: AttentionCall,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        start: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, bias = queries.contiguous(), bias.contiguous()
        keys, values = keys.contiguous(), values.contiguous()
        out = queries.new_empty(*queries.shape[:3], values.shape[-1], dtype=torch.float32)
        lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
        shape = _Shape(call, queries, keys, values, bias, start)
        with launching(queries):
            gated_kernel[(shape.tiles, shape.choosers)](
                queries, keys, values, bias, out, lse, *shape.places, call.scale, **shape.constants
            )
        ctx.call, ctx.start = call, start
        ctx.save_for_backward(queries, keys, values, bias, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
        queries, keys, values, bias, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        delta = (d_out * out).sum(-1)
        delta = delta if d_lse is None else delta - d_lse
        shape = _Shape(ctx.call, queries, keys, values, bias, ctx.start)
        states = queries, keys, values, bias, lse, delta.contiguous(), d_out.to(values.dtype).contiguous()
        d_queries, d_bias = torch.empty_like(queries), torch.zeros_like(bias)
        by_head = [x.new_zeros(*queries.shape[:2], *x.shape[1:], dtype=torch.float32) for x in (keys, values)]
        with launching(queries):
            gated_query_kernel[(shape.tiles, shape.choosers)](
                *states, d_queries, d_bias, *shape.places, ctx.call.scale, **shape.constants
            )
            blocks = bias.shape[-1] // shape.constants["PAGES"]
            gated_key_kernel[(blocks, shape.choosers)](
                *states, *by_head, *shape.places, keys.shape[1], ctx.call.scale, **shape.constants
            )
        d_keys, d_values = (x.sum(1).to(like.dtype) for x, like in zip(by_head, (keys, values), strict=True))
        return None, d_queries, d_keys, d_values, d_bias, None


class _Shape:
    """Arguments that the launches of a call have in common: tensors are contiguous, choosers are heads."""

    def __init__(
        self,
        call: AttentionCall,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        start: int,
    ) -> None:
        config = call.config
        streams, heads, rows, dim = queries.shape
        widest = pad_to_power(max(dim, values.shape[-1]))
        step = min(64, max(16, STEP_BYTES // (widest * keys.element_size())))
        self.tiles, self.choosers = triton.cdiv(rows, call.tile), streams * heads
        self.places = (
            queries.stride(1),
            dim,
            keys.stride(0),
            values.stride(0),
            bias.stride(1),
            bias.stride(2),
            rows,
            start,
            config.dense_until,
        )
        self.constants = {
            "GROUP": heads,
            "TILE": call.tile,
            "DIM": dim,
            "DIM_PAD": pad_to_power(dim),
            "VALUE_DIM": values.shape[-1],
            "VALUE_PAD": pad_to_power(values.shape[-1]),
            "CHUNK": config.chunk_size,
            "WINDOW": config.window,
            "PAGE": config.page_size,
            "PAGES": max(1, min(step // config.page_size, config.pages_per_chunk)),
            "num_warps": 4 if widest < 128 else 8,
            "num_stages": 2,
            **product_options(queries),
        }
