"""What is known of chunks, by blocks of one chunk as a cache of decode keeps it."""

import torch

from llama_surgery.attention.impl.triton.job import feature_parts
from llama_surgery.config import SurgeryConfig


def mean_blocks(means: torch.Tensor, config: SurgeryConfig, kv_heads: int) -> torch.Tensor:
    """View of mean values (streams, pages, value_dim) of whole chunks, by blocks of one chunk."""
    return means.unflatten(1, (-1, config.pages_per_chunk)).unflatten(0, (-1, kv_heads))


def feature_blocks(
    features: torch.Tensor, config: SurgeryConfig, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of what :func:`job.page_features` gives, by blocks of one chunk.

    Args:
        features: For whole chunks of streams, (streams, pages, head_dim + head_dim / variance_pool).

    Returns:
        Means and spreads (sequences, kv_heads, blocks, pages of a chunk, …).
    """
    groups = features.shape[-1] // (config.variance_pool + 1)
    halves = feature_parts(features, features.shape[-1] - groups)
    by_chunk = (half.unflatten(1, (-1, config.pages_per_chunk)) for half in halves)
    means, spreads = (half.unflatten(0, (-1, kv_heads)) for half in by_chunk)
    return means, spreads
