"""PyTorch's FlexAttention executing a plan: far pages as a block mask over keys in tree order.

Compiled on a GPU, it skips whatever the mask leaves out; elsewhere it runs as written, every pair formed
and masked, which shows that a plan means the same to another library but saves nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from llama_surgery.attention.impl.common import compute_dtype, merge
from llama_surgery.topology.mask import page_mask
from llama_surgery.topology.plan import Plan

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def near_field(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.api.Backend.near_field`."""
    offset = keys.shape[1] - queries.shape[2]

    def causal(
        stream: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return key <= row + offset

    return _flex(queries, keys, values, causal, scale, softcap)


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
    visible = page_mask(plan, keys.shape[1] // page_size)

    def opened(
        stream: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return visible[stream, row, key // page_size]

    far_out, far_lse = _flex(queries, keys, values, opened, scale, softcap)
    return merge(*near, far_out, far_lse)


@functools.cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(flex_attention)


def _flex(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: MaskMod,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    streams, _, rows, _ = queries.shape

    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    device = queries.device
    block_mask = create_block_mask(mask, streams, None, rows, keys.shape[1], device=device)
    attention: Any = _compiled() if device.type == "cuda" else flex_attention
    dtype = compute_dtype(queries.dtype)
    out, aux = attention(
        queries,
        keys.unsqueeze(1),
        values.unsqueeze(1),
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    # FlexAttention's log-sum-exp of a row without keys may be any very small number.
    lse = aux.lse.to(dtype)
    return out.to(dtype), lse.masked_fill(lse < torch.finfo(torch.float16).min * 100, -torch.inf)
