"""Triton kernels for the pages topology: layout, selection, near field and far pages.

Importing this package does not import triton; the first call does.
"""

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from llama_surgery.config import SurgeryConfig

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.prefill import TiledResult
    from llama_surgery.topology.layout import Layout

#: Most queries of a tile, and the widest head.
LARGEST_TILE, LARGEST_HEAD = 128, 256


def obstacle(config: SurgeryConfig, queries: torch.Tensor, values: torch.Tensor, tile: int) -> str | None:
    """Why the kernels cannot run a call, or None if they can.

    Args:
        config: The topology.
        queries: (..., head_dim).
        values: (..., value_dim).
        tile: Queries of a tile.
    """
    if not _installed():
        return "the package triton is not installed (pip install triton)"
    if queries.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and the tensors are on {queries.device.type!r}"
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 or bfloat16, not {queries.dtype}"
    if tile > LARGEST_TILE:
        return f"it runs tiles of at most {LARGEST_TILE} queries, not tile={tile}"
    if max(queries.shape[-1], values.shape[-1]) > LARGEST_HEAD:
        return (
            f"it runs head dims up to {LARGEST_HEAD}, not head_dim={max(queries.shape[-1], values.shape[-1])}"
        )
    if config.pages_per_row is not None:
        return "it opens pages by theta, not by pages_per_row"
    if torch.is_grad_enabled() and (queries.requires_grad or values.requires_grad):
        return "it does not differentiate here; use torch.no_grad() or backend='gather'"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend(*args: Any, **kwargs: Any) -> "TiledResult":
    """See :func:`llama_surgery.attention.impl.triton.prefill.attend`."""
    from llama_surgery.attention.impl.triton import prefill

    return prefill.attend(*args, **kwargs)


def build_layout(keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig) -> "Layout":
    """See :func:`llama_surgery.attention.impl.triton.layout.build_layout`."""
    from llama_surgery.attention.impl.triton import layout

    return layout.build_layout(keys, values, config)
