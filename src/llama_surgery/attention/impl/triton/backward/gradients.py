"""Launches of the backward pass.

Nothing is read back to the host, and nothing is added atomically: two runs agree bit by bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton.backward.key_kernels import far_gradient_kernel, near_gradient_kernel
from llama_surgery.attention.impl.triton.backward.lists import transpose
from llama_surgery.attention.impl.triton.backward.query_kernel import query_gradient_kernel
from llama_surgery.attention.impl.triton.backward.summary import summary_gradients
from llama_surgery.attention.impl.triton.backward.tuning import BackwardTuning, backward_tuning_for
from llama_surgery.attention.impl.triton.helpers import pad_to_power
from llama_surgery.attention.impl.triton.job import Job, make_job
from llama_surgery.attention.impl.triton.launch import heads_of_tile
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.attention.impl.triton.tuning import family_of


class Forward(NamedTuple):
    """What a forward pass ran on, tensors aside. Plans are of consecutive strips, the last rows last."""

    call: AttentionCall
    start: int
    plans: tuple[TiledPlan, ...]


class States(NamedTuple):
    """Tensors of a forward pass, see :func:`backward.attend`; without summaries no features and no means."""

    queries: torch.Tensor
    near_keys: torch.Tensor
    near_values: torch.Tensor
    far_keys: torch.Tensor | None
    far_values: torch.Tensor | None
    sink_logit: torch.Tensor | None
    features: torch.Tensor | None
    means: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor

    def inputs(self) -> Sequence[torch.Tensor | None]:
        """All but the results."""
        return self[:8]


class _Rows(NamedTuple):
    """Contiguous states of the rows: (streams, heads, rows, dim) and (streams, heads, rows).

    In memory they are (choosers, heads of each, …), too.
    """

    d_out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


def gradients(
    forward: Forward, states: States, d_out: torch.Tensor, d_lse: torch.Tensor | None, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of the inputs of ``states``, in their order and dtypes; None where not needed.

    Args:
        d_out: (streams, heads, rows, value_dim).
        d_lse: (streams, heads, rows), or None.
        needed: For every input, whether its gradient is asked for; that of the queries always is made.
    """
    job = make_job(forward.call, *states[:3], None, start=forward.start)  # nothing is scored
    tuning = backward_tuning_for(
        family_of(job.queries.device),
        max(job.queries.shape[-1], job.near_values.shape[-1]),
        job.queries.element_size(),
    )
    far = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in states[3:5]]
    rows = _Rows(d_out.contiguous(), states.lse, torch.empty_like(states.lse))
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_queries = _of_queries(job, tuning, forward.plans, far, states, rows, d_lse).view(states.queries.shape)
    grads: list[torch.Tensor | None] = [d_queries] + [None] * (len(needed) - 1)
    if needed[1] or needed[2]:
        grads[1:3] = _of_near_keys(job, tuning, rows)
    if far[0] is not None and far[1] is not None and (needed[3] or needed[4]):
        grads[3:5] = _of_far_keys(job, tuning, forward.plans, far[0], far[1], rows)
    if states.sink_logit is not None and needed[5]:
        # The sink is a key of value zero: its share takes -delta.
        share = (states.sink_logit.float().unsqueeze(-1) - states.lse).exp()
        grads[5] = -(share * rows.delta).sum(-1).to(states.sink_logit.dtype)
    if states.features is not None and states.means is not None:
        grads[6:8] = summary_gradients(
            job, forward.plans, states.features, states.means, *rows, d_queries, by_features=needed[6]
        )
    return grads


def _of_queries(
    job: Job,
    tuning: BackwardTuning,
    plans: Sequence[TiledPlan],
    far: Sequence[torch.Tensor | None],
    states: States,
    rows: _Rows,
    d_lse: torch.Tensor | None,
) -> torch.Tensor:
    """Gradients of queries by chooser; fills ``rows.delta``. One launch per strip."""
    choosers, heads, length, _ = job.queries.shape
    d_queries = torch.empty_like(job.queries, memory_format=torch.contiguous_format)
    page_pad = pad_to_power(job.config.page_size)
    far_keys, far_values = (
        near if x is None else x for x, near in zip(far, (job.near_keys, job.near_values), strict=True)
    )
    for first_tile, tiles, plan in _strips(job, plans):
        shape = _shape(job, tuning)
        entries = None if plan is None else plan.entries
        query_gradient_kernel[(tiles * triton.cdiv(heads, shape["HEADS_BLOCK"]), choosers)](
            job.queries,
            job.near_keys,
            job.near_values,
            far_keys,
            far_values,
            entries,
            None if plan is None else plan.counts,
            states.out,
            rows.lse,
            rows.d_out,
            d_lse,
            d_queries,
            rows.delta,
            *job.queries.stride()[:3],
            *job.near_keys.stride()[:2],
            *job.near_values.stride()[:2],
            *far_keys.stride()[:2],
            *far_values.stride()[:2],
            tiles,
            0 if entries is None else entries.shape[-1],
            length,
            job.start,
            job.stop,
            job.near_start,
            first_tile,
            job.config.dense_until,
            job.scale,
            job.cap,
            **shape,
            PAGE_PAD=page_pad,
            BLOCK_NEAR=tuning.block_near,
            FAR=plan is not None,
            num_warps=tuning.query_warps,
            num_stages=tuning.stages,
        )
    return d_queries


def _of_near_keys(job: Job, tuning: BackwardTuning, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
    shape = _shape(job, tuning)
    del shape["HEADS_BLOCK"], shape["TILE_PAD"], shape["PAGE"]
    streams, count, _ = job.near_keys.shape
    d_keys, d_values = _like(job.near_keys), _like(job.near_values)
    near_gradient_kernel[(triton.cdiv(count, tuning.block_keys), streams)](
        job.queries,
        job.near_keys,
        job.near_values,
        rows.lse,
        rows.delta,
        rows.d_out,
        d_keys,
        d_values,
        *job.queries.stride()[:3],
        *job.near_keys.stride()[:2],
        *job.near_values.stride()[:2],
        job.queries.shape[2],
        job.start,
        job.near_start,
        job.config.dense_until,
        job.scale,
        job.cap,
        **shape,
        BLOCK_KEYS=tuning.block_keys,
        BLOCK_ROWS=tuning.block_rows,
        num_warps=tuning.near_warps,
        num_stages=tuning.stages,
    )
    return d_keys, d_values


def _of_far_keys(
    job: Job,
    tuning: BackwardTuning,
    plans: Sequence[TiledPlan],
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: _Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in tree order: of one strip as they are, of several added up in float32."""
    if not plans:
        return torch.zeros_like(keys), torch.zeros_like(values)
    streams, slots, _ = keys.shape
    several = len(plans) > 1
    d_keys, d_values = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if several else _like(x)
        for x in (keys, values)
    )
    shape = _shape(job, tuning)
    del shape["CHUNK"], shape["WINDOW"]
    page = job.config.page_size
    for plan in plans:
        assert plan.entries is not None
        pages = job.pages_of((plan.stop - 1) // plan.tile)
        readers, counts = transpose(plan, pages)
        far_gradient_kernel[(pages if several else slots // page, streams)](
            job.queries,
            keys,
            values,
            readers,
            counts,
            rows.lse,
            rows.delta,
            rows.d_out,
            d_keys,
            d_values,
            *job.queries.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            pages,
            plan.counts.shape[1],
            slots,
            job.queries.shape[2],
            job.start,
            plan.start // plan.tile,
            job.scale,
            job.cap,
            **shape,
            PAGE_PAD=pad_to_power(page),
            ADD=several,
            num_warps=tuning.far_warps,
            num_stages=tuning.stages,
        )
    return d_keys.to(keys.dtype), d_values.to(values.dtype)


def _strips(job: Job, plans: Sequence[TiledPlan]) -> list[tuple[int, int, TiledPlan | None]]:
    """First tile, tiles and plan of every launch; rows before the first plan have no far field."""
    first, tiles, _ = job.whole()
    strips: list[tuple[int, int, TiledPlan | None]] = [
        (plan.start // plan.tile, plan.counts.shape[1], plan) for plan in plans
    ]
    planned = strips[0][0] if strips else first + tiles
    if planned > first:
        strips.insert(0, (first, planned - first, None))
    return strips


def _shape(job: Job, tuning: BackwardTuning) -> dict[str, Any]:
    constants = job.constants()
    return {**constants, "HEADS_BLOCK": heads_of_tile(constants["HEADS"], tuning.rows, constants["TILE_PAD"])}


def _like(states: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)
