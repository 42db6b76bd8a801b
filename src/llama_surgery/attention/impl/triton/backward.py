"""Attention through the pages topology with gradients: by queries, keys, values, sink logits, page biases.

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
from llama_surgery.attention.impl.triton.job import Strip, make_job
from llama_surgery.attention.impl.triton.selection import select
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
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
    return Layout(reorder(keys, built.order), reorder(values, built.order), built.order, built.moments)


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
    states = States(
        queries, near_keys, near_values, far_keys, far_values, sink_logit, None, result.out, result.lse
    )
    out, lse = _Gradients.apply(call, states, *states.inputs())
    return dataclasses.replace(result, out=out, lse=lse)


def plan_pages(
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
) -> TiledPlan:
    """What the rows open, for :func:`attend_plan`: lists cut to the longest of them.

    Arguments are those of :func:`attend`. The length of the longest list is read back to the host, once.
    """
    with torch.no_grad():
        job = make_job(
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
        )
        strip = job.whole()
        if strip.pages == 0:
            counts = torch.zeros(job.queries.shape[0], strip.tiles, dtype=torch.int32, device=queries.device)
            entries = counts.new_empty(*counts.shape, 0)
            return TiledPlan(start, job.stop, job.tile, counts, counts, entries)
        with launching(queries):
            plan = select(job, strip)
    return plan.trimmed()


def attend_plan(
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | None,
    plan: TiledPlan,
    *,
    config: SurgeryConfig,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    page_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the near field and a given plan's pages, differentiable as :func:`attend` is.

    Args:
        queries, near_keys, near_values, layout, config, scale, softcap, sink_logit: Those of :func:`attend`;
            tile and rows are the plan's.
        plan: From :func:`plan_pages`.
        page_bias: (streams, tiles, listed, heads, tile) float32, or None. Added, in natural logarithms, to
            the (capped) logits of a row and head with all keys of the page that ``plan.entries`` (streams,
            tiles, listed) names: a soft gate on the page. Its gradient is the sum of those logits'
            gradients; it is zero where a row does not see the page, or the list is shorter.

    Returns:
        Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows) float32.

    Raises:
        SurgeryError: The plan or the bias does not fit the rows, or the kernels cannot run the call.
    """
    if plan.entries is None:
        raise SurgeryError("the lists of this plan were not kept: take it from plan_pages().")
    streams, heads, rows = queries.shape[:3]
    choosers = streams if plan.tile == 1 else streams * heads
    if (plan.entries.shape[0], plan.stop - plan.start) != (choosers, rows):
        raise SurgeryError(
            f"the plan is for {plan.entries.shape[0]} choosers of {plan.stop - plan.start} rows, the queries "
            f"are {choosers} choosers of {rows}: plan the same rows."
        )
    expected = (*plan.entries.shape, streams * heads // choosers, plan.tile)
    if page_bias is not None and (page_bias.shape != expected or page_bias.dtype != torch.float32):
        raise SurgeryError(
            f"page_bias {tuple(page_bias.shape)} {page_bias.dtype}: expected (streams, tiles, listed, heads, "
            f"tile) = {expected} in torch.float32."
        )
    page_bias = None if page_bias is None else page_bias.contiguous()
    with torch.no_grad():
        job = make_job(
            queries,
            near_keys,
            near_values,
            None,  # nothing is scored
            config=config,
            start=plan.start,
            tile=plan.tile,
            scale=scale,
            softcap=softcap,
            sink_logit=sink_logit,
        )
        job = dataclasses.replace(job, layout=layout)
        out = queries.new_empty(streams, heads, rows, near_values.shape[-1])
        lse = queries.new_empty(streams, heads, rows, dtype=torch.float32)
        strip = Strip(plan.start // plan.tile, *plan.entries.shape[1:])
        listed = plan if strip.pages else None
        with launching(queries):
            by_chooser = out.view(*job.queries.shape[:3], -1), lse.view(job.queries.shape[:3])
            prefill.attend_strip(job, strip, listed, *by_chooser, page_bias=page_bias)
    call = Call(config, plan.start, plan.tile, scale, softcap, () if listed is None else (plan,))
    far_keys, far_values = (None, None) if layout is None else (layout.keys, layout.values)
    states = States(queries, near_keys, near_values, far_keys, far_values, sink_logit, page_bias, out, lse)
    return _Gradients.apply(call, states, *states.inputs())


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
