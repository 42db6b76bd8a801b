"""Who executes calls of attention, and what the kernels keep of a layout where they do."""

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.layout import build_layout as plain_layout
from llama_surgery.topology.router import PageRouter


def backend_name(
    config: SurgeryConfig,
    queries: torch.Tensor,
    values: torch.Tensor,
    tile: int,
    *,
    listening: bool = False,
    learning: bool = False,
) -> str:
    """Who executes a call: the backend asked for, or the fastest that can.

    Args:
        config: Names the backend, or leaves it to this function.
        queries: (..., head_dim), for their device, dtype and gradient.
        values: (..., value_dim).
        tile: Queries of a tile.
        listening: Shares are asked for (calibration).
        learning: Gradients by learned corrections are asked for.

    Raises:
        SurgeryError: The backend asked for by name cannot run this call.
    """
    if config.backend not in ("auto", "triton"):
        return config.backend
    if config.backend == "auto" and queries.device.type != "cuda":
        return "gather"  # also where Triton's interpreter could run the kernels: it is for tests
    from llama_surgery.attention.impl import triton

    problem = triton.obstacle(config, queries, values, tile)
    if problem is None and listening:
        problem = "shares are not handed out (calibration): use backend='auto' or 'gather'"
    if problem is None and learning:
        problem = "it has no gradients by learned corrections: use backend='auto' or 'gather'"
    if problem is None:
        return "triton"
    if config.backend == "triton":
        raise SurgeryError(f"backend='triton' cannot run this: {problem}.")
    return "gather"


def build_layout(
    keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig, router: PageRouter | None = None
) -> Layout:
    """Lay out full chunks, on a GPU by kernels; see :func:`llama_surgery.topology.layout.build_layout`."""
    if kernels_serve(config, keys, values):
        from llama_surgery.attention.impl import triton

        return triton.build_layout(keys, values, config, router)
    return plain_layout(keys, values, config, router)


def kernels_serve(config: SurgeryConfig, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Do the Triton kernels execute calls on these keys and values, and so score their pages?"""
    return backend_name(config, keys, values, config.tile) == "triton"


def kernel_features(moments: Moments, config: SurgeryConfig, dtype: torch.dtype) -> torch.Tensor:
    """What the Triton kernels score pages by: ``Layout.features``."""
    from llama_surgery.attention.impl.triton.job import page_features

    return page_features(moments, dtype, config.variance_pool)


def kernel_moments(features: torch.Tensor, config: SurgeryConfig) -> Moments:
    """Moments of pages back from :func:`kernel_features`, as exactly as those were kept."""
    from llama_surgery.attention.impl.triton.job import moments_from

    return moments_from(features, config)
