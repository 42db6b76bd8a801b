"""Executing plans block by block in plain PyTorch: near field, selection, far field."""

from typing import Protocol

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.common import merge
from llama_surgery.attention.result import AttentionResult
from llama_surgery.attention.summary import summary
from llama_surgery.topology.geometry import query_blocks
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.plan import Plan
from llama_surgery.topology.selection import Scorer, score_pages, select


class Backend(Protocol):
    """A way to execute plans: what each module of ``attention/impl`` offers."""

    def near_field(
        self, call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the last rows of a run of keys.

        Args:
            call: Scaling and cap of the logits.
            queries: (streams, heads, rows, head_dim).
            keys: (streams, n, head_dim), the last ``rows`` of them the rows' own.
            values: (streams, n, value_dim).

        Returns:
            Output (streams, heads, rows, value_dim) and log-sum-exp (streams, heads, rows).
        """

    def far_field(
        self,
        call: AttentionCall,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: Plan,
        near: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the plan's pages, merged with the near field's.

        Args:
            call: Pages, scaling and cap of the logits.
            queries: (streams, heads, rows, head_dim), the rows of the plan's block.
            keys: (streams, pages * page_size, head_dim) in tree order.
            values: (streams, pages * page_size, value_dim), the same order.
            plan: Which pages each tile reads, and which rows see them; its choosers are heads, or streams.
            near: Output and log-sum-exp of :meth:`near_field`.

        Returns:
            Output and log-sum-exp over near field and far pages together.
        """


def attend(
    backend: Backend,
    call: AttentionCall,
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | None,
    *,
    start: int,
    sink_logit: torch.Tensor | None = None,
) -> AttentionResult:
    """See :func:`llama_surgery.attention.api.attend`; ``backend`` executes near fields and plans."""
    config, router = call.config, call.router
    if router is not None:
        router = router.for_streams(queries.shape[0], queries.device)
    scorer = Scorer(call.scale, call.softcap, router)
    stop = start + queries.shape[2]
    near_start = stop - near_keys.shape[1]  # position of near_keys[:, 0]
    outs, lses = [], []
    plans: list[Plan] = []
    for block in query_blocks(start, stop, config, call.tile):
        q = queries[:, :, block.start - start : block.stop - start]
        first = block.closed * config.chunk_size
        span = slice(first - near_start, block.stop - near_start)
        near = backend.near_field(call, q, near_keys[:, span], near_values[:, span])
        if block.closed and layout is not None:
            # Scores open pages, weights stand in for the others: both come of the same products.
            scored = None
            if config.summarises(call.tile):
                scored = score_pages(q, layout, block, config, scorer)
            plan = select(
                q.detach(),
                layout,
                near[1].detach(),
                block,
                config=config,
                tile=call.tile,
                scorer=scorer,
                sink_logit=sink_logit,
                scored=None if scored is None else (scored[0].detach(), scored[1].detach()),
            )
            plans.append(plan)
            far = slice(0, first)
            near = backend.far_field(call, q, layout.keys[:, far], layout.values[:, far], plan, near)
            if scored is not None:
                near = merge(*near, *summary(scored[1], layout, plan, scorer))
        out, lse = near
        if sink_logit is not None:
            # The sink takes its share of the softmax and contributes no value.
            total = torch.logaddexp(lse, sink_logit.to(lse.dtype)[..., None])
            out, lse = out * (lse - total).exp().unsqueeze(-1), total
        outs.append(out.to(queries.dtype))
        lses.append(lse)
    return AttentionResult(torch.cat(outs, 2), torch.cat(lses, 2), plans)
