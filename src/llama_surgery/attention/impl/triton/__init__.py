"""Triton kernels for the pages topology: layout, selection, near field and far pages.

Importing this package does not import triton; the first call does.
"""

import functools
import importlib.util
import os

import torch

from llama_surgery.config import SurgeryConfig

#: Most queries of a tile, and the widest head.
LARGEST_TILE, LARGEST_HEAD = 128, 256

#: Squares beyond it would overflow in float16: variances are kept no larger.
LARGEST_SQUARE = 6.0e4

#: Most keys of a chunk, which one program splits in its registers. Keys of wide heads are held whole:
#: of these a program holds LARGEST_BLOCK elements at most.
LARGEST_CHUNK, LARGEST_BLOCK = 8192, 1 << 20

#: Widest head whose covariance fits the registers of a program.
WIDEST_GRAM = 128

#: Most queries per sequence of a call of decode.
MOST_QUERIES = 8


def obstacle(config: SurgeryConfig, queries: torch.Tensor, values: torch.Tensor, tile: int) -> str | None:
    """Why the kernels cannot run a call, or None if they can.

    Args:
        queries: (..., head_dim).
        values: (..., value_dim).
        tile: Queries of a tile.
    """
    if not _installed():
        return "the package triton is not installed (pip install triton)"
    if queries.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and the tensors are on {queries.device.type!r}"
    if queries.device.type == "cuda" and (old := _too_old(queries.device)):
        return old
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 or bfloat16, not {queries.dtype}"
    if tile > LARGEST_TILE:
        return f"it runs tiles of at most {LARGEST_TILE} queries, not tile={tile}"
    if max(queries.shape[-1], values.shape[-1]) > LARGEST_HEAD:
        return (
            f"it runs head dims up to {LARGEST_HEAD}, not head_dim={max(queries.shape[-1], values.shape[-1])}"
        )
    most = _largest_chunk(queries.shape[-1])
    if config.chunk_size > max(most, config.page_size):  # a chunk that is one page is not sorted
        return (
            f"it sorts chunks of up to {most} keys of {queries.shape[-1]} channels, not "
            f"chunk_size={config.chunk_size}"
        )
    return None


def _largest_chunk(head_dim: int) -> int:
    padded = 1 << (head_dim - 1).bit_length()
    return LARGEST_CHUNK if padded <= WIDEST_GRAM else min(LARGEST_CHUNK, LARGEST_BLOCK // padded)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """What is to be said of a GPU that Triton does not compile for."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= (8, 0):
        return None
    has = f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    return f"it needs compute capability 8.0 or more, and {has}"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
