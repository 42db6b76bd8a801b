"""Attention through the pages topology with gradients: by queries, keys, values, sink logits.

What rows open is constant: no gradient passes through the selection.
"""

import dataclasses
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton.backward.gradients import Forward, States, gradients
from llama_surgery.attention.impl.triton.helpers import launching
from llama_surgery.attention.impl.triton.job import features_of
from llama_surgery.attention.impl.triton.layout import launch as layouts
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, Moments, mean_values, reorder
from llama_surgery.topology.router import PageRouter


def build_layout(
    keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig, router: PageRouter | None = None
) -> Layout:
    """:func:`layout.build_layout`, differentiable by the keys and values given.

    The order is constant; so are moments that nothing but the selection reads.
    """
    with torch.no_grad():
        built = layouts.build_layout(keys, values, config, router)
    keys, values = (reorder(x, built.order) for x in (keys, values))
    built = dataclasses.replace(built, keys=keys, values=values)
    if config.summary == "none":
        return built
    means = mean_values(values, config, values.dtype)
    mean, variance = _Moments.apply(keys, built.moments.mean, built.moments.variance)
    moments = Moments(mean, variance, config.page_size)
    return dataclasses.replace(built, moments=moments, features=None, mean_values=means)


def attend(
    call: AttentionCall,
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | None,
    *,
    start: int,
    sink_logit: torch.Tensor | None = None,
) -> AttentionResult:
    """:func:`prefill.attend`, differentiable.

    ``out`` and ``lse`` have gradients by queries, near keys and values, the layout's keys, values and what
    stands in for its pages, and sink logits; by ``router`` there are none. A key that is both a near key and
    in the layout gets the sum where both were made from one tensor by PyTorch, as by :func:`build_layout`.
    The plans keep their lists, which the backward pass walks, cut to the longest of a strip: its length is
    read back.
    """
    features = means = None
    if layout is not None and call.config.summarises(call.tile):
        assert layout.mean_values is not None
        features, means = features_of(layout, queries.dtype), layout.mean_values.to(queries.dtype)
        layout = dataclasses.replace(layout, features=features, mean_values=means)
    with torch.no_grad():
        result = prefill.attend(
            call, queries, near_keys, near_values, layout, start=start, sink_logit=sink_logit, trim_lists=True
        )
    forward = Forward(call, start, cast("tuple[TiledPlan, ...]", tuple(result.plans)))
    far_keys, far_values = (None, None) if layout is None else (layout.keys, layout.values)
    states = States(
        queries,
        near_keys,
        near_values,
        far_keys,
        far_values,
        sink_logit,
        features,
        means,
        result.out,
        result.lse,
    )
    out, lse = _Gradients.apply(forward, states, *states.inputs())
    return dataclasses.replace(result, out=out, lse=lse)


class _Moments(torch.autograd.Function):
    """Hangs gradients by keys (streams, slots, head_dim) in tree order on moments that were made of them."""

    @staticmethod
    def forward(
        ctx: Any, keys: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(keys, mean)
        return mean.clone(), variance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: torch.Tensor, d_variance: torch.Tensor) -> Any:
        keys, mean = ctx.saved_tensors
        pages = keys.float().unflatten(1, (mean.shape[1], -1))
        d_keys = d_mean.unsqueeze(2) + 2 * d_variance.unsqueeze(2) * (pages - mean.unsqueeze(2))
        return (d_keys / pages.shape[2]).flatten(1, 2).to(keys.dtype), None, None


class _Gradients(torch.autograd.Function):
    """Hangs gradients on a forward pass that has run."""

    @staticmethod
    def forward(ctx: Any, run: Forward, states: States, *_inputs: torch.Tensor | None) -> Any:
        # Lists are saved as tensors, so that they are given back after the backward pass, as the states are.
        lists = [tensor for plan in run.plans for tensor in (plan.counts, plan.entries)]
        ctx.run = run._replace(plans=())
        ctx.plans = [(p.start, p.stop, p.tile, p.pages) for p in run.plans]
        ctx.save_for_backward(*states, *lists)
        ctx.set_materialize_grads(False)
        return states.out, states.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
        count = len(States._fields)
        states, lists = States(*ctx.saved_tensors[:count]), iter(ctx.saved_tensors[count:])
        plans = (
            TiledPlan(start, stop, tile, counts, counts, entries, pages=pages)
            for (start, stop, tile, pages), counts, entries in zip(ctx.plans, lists, lists, strict=True)
        )
        run = ctx.run._replace(plans=tuple(plans))
        if d_out is None and d_lse is None:
            return (None,) * (2 + len(states.inputs()))
        if d_out is None:
            d_out = torch.zeros_like(states.out)
        with launching(states.queries):
            return None, None, *gradients(run, states, d_out, d_lse, ctx.needs_input_grad[2:])
