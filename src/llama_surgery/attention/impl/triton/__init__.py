"""Triton kernels for the pages topology: layout, selection, near field and far pages.

Importing this package does not import triton; the first call does.
"""

import functools
import importlib.util
import os

import torch

from llama_surgery.config import SurgeryConfig

#: Most queries of a tile, the widest head, and most keys of a page, which one step of a program loads.
LARGEST_TILE, LARGEST_HEAD, LARGEST_PAGE = 128, 256, 128

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
    return unfit(config, queries.shape[-1], values.shape[-1], tile)


def unfit(config: SurgeryConfig, head_dim: int, value_dim: int, tile: int) -> str | None:
    """:func:`obstacle` as far as a configuration and the shape of heads tell, on whatever device."""
    if tile > LARGEST_TILE:
        return f"it runs tiles of at most {LARGEST_TILE} queries, not tile={tile}"
    if config.page_size > LARGEST_PAGE:
        return f"it runs pages of at most {LARGEST_PAGE} keys, not page_size={config.page_size}"
    if max(head_dim, value_dim) > LARGEST_HEAD:
        return f"it runs head dims up to {LARGEST_HEAD}, not head_dim={max(head_dim, value_dim)}"
    padded = 1 << (head_dim - 1).bit_length()
    most = LARGEST_CHUNK if padded <= WIDEST_GRAM else min(LARGEST_CHUNK, LARGEST_BLOCK // padded)
    if config.chunk_size > most:
        return (
            f"it sorts chunks of up to {most} keys of {head_dim} channels, not chunk_size={config.chunk_size}"
        )
    return None


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
