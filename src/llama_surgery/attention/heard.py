"""What calibration hears: the shares of what will be executed, though the kernels do not hand them out."""

import dataclasses

import torch

from llama_surgery.attention.impl.triton import LARGEST_SQUARE, obstacle
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, Moments


def heard_layout(
    layout: Layout, config: SurgeryConfig, queries: torch.Tensor, values: torch.Tensor, tile: int
) -> Layout:
    """The layout as its pages are scored where ``config`` is executed, for plain PyTorch to score them.

    The kernels keep what they score pages by in the keys' dtype. A threshold is for the shares that follow
    from that, not for those of moments in full precision.

    Args:
        layout: Full chunks.
        config: What will be executed; its backend decides.
        queries: (..., head_dim), for their device and dtype.
        values: (..., value_dim).
        tile: Queries of a tile.
    """
    by_kernels = config.backend == "triton" or (
        config.backend == "auto"
        and queries.device.type == "cuda"
        and obstacle(config, queries, values, tile) is None
    )
    if not by_kernels or layout.features is not None:  # moments that come with features were made of them
        return layout
    return dataclasses.replace(layout, moments=rounded_moments(layout.moments, queries.dtype))


def rounded_moments(moments: Moments, dtype: torch.dtype) -> Moments:
    """Moments as exactly as the kernels keep them in ``dtype``, on any device."""
    spread = (0.5 * moments.variance).clamp_max(LARGEST_SQUARE)
    mean, spread = (part.to(dtype).to(moments.mean.dtype) for part in (moments.mean, spread))
    return Moments(mean, 2 * spread, moments.size)
