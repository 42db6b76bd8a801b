"""Executing a topology on the queries of one layer: near field, selection, far field.

A *stream* is one KV head of one sequence; queries come grouped, all query heads of a KV head together.
"""

import torch

from llama_surgery.attention.check import check_call
from llama_surgery.attention.executor import executor_of, resolve
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.router import PageRouter


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
) -> AttentionResult:
    """Attention of consecutive rows through the configured topology.

    Args:
        queries: (streams, heads, rows, head_dim), rotary embedding applied, rows at positions
            ``start … start + rows - 1``.
        near_keys: (streams, n, head_dim), the last n keys in order of position, ending with the last
            row's own; n reaches back at least to the start of the first row's near field.
        near_values: (streams, n, value_dim).
        layout: Full chunks, at least those closed for the last row; None where none is.
        start: Position of the first row.
        tile: Queries of a tile: ``config.tile`` (default) or 1 for a decode step.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.
        sink_logit: (streams, heads) attention-sink parameters, or None.
        router: Learned corrections, one for every KV head, or None.

    Raises:
        SurgeryError: Shapes, dtypes or devices that do not fit together.
    """
    tile = config.tile if tile is None else tile
    check_call(queries, near_keys, near_values, layout, config, start, tile, sink_logit, router)
    call = resolve(
        config,
        queries,
        near_values,
        tile,
        scale=scale,
        softcap=softcap,
        router=router,
    )
    execute = executor_of(call, queries, near_keys, near_values, layout, sink_logit)
    return execute(queries, near_keys, near_values, layout, start=start, sink_logit=sink_logit)
