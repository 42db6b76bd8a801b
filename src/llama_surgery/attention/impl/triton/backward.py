"""Attention through the pages topology with gradients: by queries, keys, values, sink logits.

What rows open is constant: no gradient passes through the selection.
"""

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llama_surgery.attention.impl.triton import layout as layouts
from llama_surgery.attention.impl.triton import prefill
from llama_surgery.attention.impl.triton.backward_pass import Call, States, gradients
from llama_surgery.attention.impl.triton.helpers import launching
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, reorder
from llama_surgery.topology.router import PageRouter


def build_layout(
    keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig, router: PageRouter | None = None
) -> Layout:
    """:func:`layout.build_layout` whose keys and values are differentiable by those given.

    Their order and the moments are constant.
    """
    with torch.no_grad():
        built = layouts.build_layout(keys, values, config, router)
    keys, values = (reorder(x, built.order) for x in (keys, values))
    return dataclasses.replace(built, keys=keys, values=values)


def attend(
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | None,
    *,
    config: SurgeryConfig,
    start: int,
    tile: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    router: PageRouter | None = None,
) -> prefill.TiledResult:
    """:func:`prefill.attend`, differentiable.

    ``out`` and ``lse`` have gradients by queries, near keys and values, the layout's keys and values and sink
    logits; by ``router`` there are none. A key that is both a near key and in the layout gets the sum where
    both were made from one tensor by PyTorch, as by :func:`build_layout`. The plans
    keep their lists, which the backward pass walks, cut to the longest of a strip: its length is read back.

    Raises:
        SurgeryError: A dtype, tile or rule that these kernels do not run.
    """
    with torch.no_grad():
        result = prefill.attend(
            queries,
            near_keys,
            near_values,
            layout,
            config=config,
            start=start,
            tile=tile,
            scale=scale,
            softcap=softcap,
            sink_logit=sink_logit,
            router=router,
            trim_lists=True,
        )
    call = Call(config, start, config.tile if tile is None else tile, scale, softcap, tuple(result.plans))
    far_keys, far_values = (None, None) if layout is None else (layout.keys, layout.values)
    states = States(queries, near_keys, near_values, far_keys, far_values, sink_logit, result.out, result.lse)
    out, lse = _Gradients.apply(call, states, *states.inputs())
    return dataclasses.replace(result, out=out, lse=lse)


class _Gradients(torch.autograd.Function):
    """Hangs gradients on a forward pass that has run."""

    @staticmethod
    def forward(ctx: Any, call: Call, states: States, *_inputs: torch.Tensor | None) -> Any:
        # Lists are saved as tensors, so that they are given back after the backward pass, as the states are.
        lists = [tensor for plan in call.plans for tensor in (plan.counts, plan.entries)]
        ctx.call, ctx.plans = call._replace(plans=()), [(p.start, p.stop, p.tile) for p in call.plans]
        ctx.save_for_backward(*states, *lists)
        ctx.set_materialize_grads(False)
        return states.out, states.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
        count = len(States._fields)
        states, lists = States(*ctx.saved_tensors[:count]), iter(ctx.saved_tensors[count:])
        plans = (
            TiledPlan(start, stop, tile, counts, counts, entries)
            for (start, stop, tile), counts, entries in zip(ctx.plans, lists, lists, strict=True)
        )
        call = ctx.call._replace(plans=tuple(plans))
        if d_out is None and d_lse is None:
            return (None,) * (2 + len(states.inputs()))
        if d_out is None:
            d_out = torch.zeros_like(states.out)
        with launching(states.queries):
            return None, None, *gradients(call, states, d_out, d_lse, ctx.needs_input_grad[2:])
