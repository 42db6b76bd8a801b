"""Executing a topology on the queries of one layer: near field, selection, far field.

A *stream* is one KV head of one sequence; queries come grouped, all query heads of a KV head together.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from llama_surgery.attention.check import check_call
from llama_surgery.attention.executor import backend_name
from llama_surgery.attention.impl.common import differentiable, merge
from llama_surgery.attention.summary import summary
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import query_blocks, summary_pairs
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.plan import Plan
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import Scorer, ShareListener, score_pages, select

#: Modules that execute plans block by block, loaded when first asked for. ``triton`` takes whole calls.
BACKENDS = ("reference", "gather")


class Backend(Protocol):
    """A way to execute plans: what each module of ``attention/impl`` offers."""

    def near_field(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the last rows of a run of keys.

        Args:
            queries: (streams, heads, rows, head_dim).
            keys: (streams, n, head_dim), the last ``rows`` of them the rows' own.
            values: (streams, n, value_dim).
            scale: Scaling of q·k.
            softcap: Cap of the logits, or None.

        Returns:
            Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows).
        """

    def far_field(
        self,
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
        """Attention over the plan's pages, merged with the near field's.

        Args:
            queries: (streams, heads, rows, head_dim), the rows of the plan's block.
            keys: (streams, pages * page_size, head_dim) in tree order.
            values: (streams, pages * page_size, value_dim), the same order.
            page_size: Keys of a page.
            plan: Which pages each tile reads, and which rows see them; its choosers are heads, or streams.
            near: Output and log-sum-exp of :meth:`near_field`.
            scale: Scaling of q·k.
            softcap: Cap of the logits, or None.

        Returns:
            Output and log-sum-exp over near field and far pages together.
        """


class CountedPlan(Protocol):
    """What the accounting asks of a plan, in whatever form its backend keeps it."""

    @property
    def counts(self) -> torch.Tensor:
        """(choosers, tiles), pages each tile reads."""

    def executed_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,): (query, key) pairs the far pass reads for one query head."""

    def visible_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,): pairs that the rows may see."""


@dataclasses.dataclass(frozen=True)
class AttentionResult:
    """What :func:`attend` returns.

    Attributes:
        out: (streams, heads, rows, value_dim), the queries' dtype.
        lse: (streams, heads, rows) log-sum-exp of the visible logits, float32 or float64.
        plans: Plans of all rows that had closed chunks.
        near_pairs: (query, key) pairs of the near field, for one query head.
        causal_pairs: Pairs that dense attention would read, for one query head.
        summary_pairs: What summaries cost beside (:func:`~llama_surgery.topology.geometry.summary_pairs`).
    """

    out: torch.Tensor
    lse: torch.Tensor
    plans: Sequence[CountedPlan]
    near_pairs: int
    causal_pairs: int
    summary_pairs: float = 0.0


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
    listener: ShareListener | None = None,
    router: PageRouter | None = None,
) -> AttentionResult:
    """Attention of consecutive rows through the configured topology.

    Args:
        queries: (streams, heads, rows, head_dim), rotary embedding applied, rows at positions
            ``start … start + rows - 1``.
        near_keys: (streams, n, head_dim), the last n keys in order of position, ending with the last
            row's own; n reaches back at least to the start of the first row's near field.
        near_values: (streams, n, value_dim).
        layout: Full chunks, at least those closed for the last row; None where none is.
        config: The topology.
        start: Position of the first row.
        tile: Queries of a tile: ``config.tile`` (default) or 1 for a decode step.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.
        sink_logit: (streams, heads) attention-sink parameters, or None.
        listener: Hears the log shares of every block (calibration).
        router: Learned corrections, one for every KV head, or None.

    Raises:
        SurgeryError: Shapes, dtypes or devices that do not fit together.
    """
    tile = config.tile if tile is None else tile
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    rows = queries.shape[2] if queries.dim() == 4 else 0
    stop = start + rows
    check_call(queries, near_keys, near_values, layout, config, start, tile, sink_logit, router)
    learning = router is not None and differentiable(*router.tensors().values())
    name = backend_name(config, queries, near_values, tile, listening=listener is not None, learning=learning)
    summaries = summary_pairs(start, stop, config, tile)
    if name == "triton":
        from llama_surgery.attention.impl import triton

        found = triton.attend(
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
        )
        return AttentionResult(
            found.out, found.lse, found.plans, found.near_pairs, found.causal_pairs, summaries
        )
    backend = cast(Backend, importlib.import_module(f"llama_surgery.attention.impl.{name}"))
    if router is not None:
        router = router.for_streams(queries.shape[0], queries.device)
    scorer = Scorer(scale, softcap, router, config.variance_pool)
    near_start = stop - near_keys.shape[1]  # position of near_keys[:, 0]
    outs, lses, near_pairs = [], [], 0
    plans: list[Plan] = []
    for block in query_blocks(start, stop, config, tile):
        q = queries[:, :, block.start - start : block.stop - start]
        first = block.closed * config.chunk_size
        span = slice(first - near_start, block.stop - near_start)
        near = backend.near_field(q, near_keys[:, span], near_values[:, span], scale=scale, softcap=softcap)
        if block.closed and layout is not None:
            # Scores open pages, weights stand in for the others: both come of the same products.
            scored = None
            if config.summarises(tile):
                scored = score_pages(q, layout, block, config, scorer)
            plan = select(
                q.detach(),
                layout,
                near[1].detach(),
                block,
                config=config,
                tile=tile,
                scorer=scorer,
                sink_logit=sink_logit,
                listener=listener,
                scored=None if scored is None else (scored[0].detach(), scored[1].detach()),
            )
            plans.append(plan)
            far = slice(0, first)
            near = backend.far_field(
                q,
                layout.keys[:, far],
                layout.values[:, far],
                config.page_size,
                plan,
                near,
                scale=scale,
                softcap=softcap,
            )
            if scored is not None:
                near = merge(*near, *summary(scored[1], layout, plan, scorer))
        out, lse = near
        if sink_logit is not None:
            # The sink takes its share of the softmax and contributes no value.
            total = torch.logaddexp(lse, sink_logit.to(lse.dtype)[..., None])
            out, lse = out * (lse - total).exp().unsqueeze(-1), total
        outs.append(out.to(queries.dtype))
        lses.append(lse)
        near_pairs += _triangle(block.stop - first) - _triangle(block.start - first)
    return AttentionResult(
        torch.cat(outs, 2),
        torch.cat(lses, 2),
        plans,
        near_pairs,
        _triangle(stop) - _triangle(start),
        summaries,
    )


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
