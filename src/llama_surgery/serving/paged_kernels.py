"""Operated attention on an engine's paged cache by the Triton kernels.

Decode rows read keys, values and features where the engine put them, through block tables: static shapes, no
host synchronisation, so that a step can be captured in a CUDA graph.
"""

from typing import TYPE_CHECKING

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.serving.moves import in_a_row
from llama_surgery.topology.router import PageRouter

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.decode.cache import DecodeCache
    from llama_surgery.attention.impl.triton.job import PooledLayout
    from llama_surgery.serving.paged import PagedStates


def pooled(cache: "PagedStates", blocks: torch.Tensor, first: torch.Tensor) -> "PooledLayout":
    """Full chunks, ``blocks`` (n,) int64: what pages are scored by copied, the rest not.

    ``first`` (pieces,) int64: the block with position 0 of every sequence that reads them.
    """
    from llama_surgery.attention.impl.triton.job import PooledLayout

    pages, width = in_a_row(cache.pages, blocks), 2 * cache.head_dim
    states = cache.slots
    keys, values, apart = states or (in_a_row(cache.keys, blocks), in_a_row(cache.values, blocks), 0)
    return PooledLayout(
        keys,
        values,
        blocks if states else None,
        apart,
        pages[..., :width],
        None if cache.mean_values is None else pages[..., width:],
        cache.first_pages[first],
    )


def decode_rows(
    queries: torch.Tensor,
    cache: "PagedStates",
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    router: PageRouter | None = None,
    tally: torch.Tensor | None = None,
    whole: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the decode rows of a scheduled batch, one of each sequence, in three launches.

    Nothing is asked of the device. Work is split by the width of ``tables``: pass no more columns than the
    longest sequence has chunks, where it is known.

    Args:
        queries: (sequences, heads, head_dim), rotary embedding applied; query heads of a KV head are
            neighbours.
        cache: With the rows' own keys and values written. Full chunks are in tree order, also those that
            these rows filled.
        tables: (sequences, chunks) int32, block of every chunk; entries behind a sequence's end are not read.
        positions: (sequences,) int32, position of each row; -1 for a row that only pads the batch, whose
            output is zero. A row behind the chunks of ``tables`` gets NaN.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.
        router: Learned corrections of the layer, one for every KV head, or None.
        tally: (2, kv_heads) int64, to which pages opened and pages read are added, or None.
        whole: (sequences,) int32, not 0 for rows that see everything; None where none does.

    Returns:
        (sequences, heads, head_dim), contiguous, the queries' dtype.

    Raises:
        SurgeryError: Shapes or dtypes that do not fit, or a rule that the kernels do not run.
    """
    from llama_surgery.attention.impl.triton.decode.launch import decode

    sequences, heads, dim = queries.shape
    kv_heads = cache.keys.shape[1]
    for name, given, shape in (
        ("tables", tables, (sequences, tables.shape[-1])),
        ("positions", positions, (sequences,)),
    ):
        if given.dtype != torch.int32 or given.shape != shape:
            raise SurgeryError(
                f"{name} {tuple(given.shape)} {given.dtype}: expected {shape} torch.int32 for queries "
                f"{tuple(queries.shape)}."
            )
    if heads % kv_heads:
        raise SurgeryError(f"{heads} query heads for {kv_heads} KV heads: not a multiple.")
    view = kernel_view(cache, tables, positions, whole)
    grouped = queries.reshape(sequences * kv_heads, heads // kv_heads, 1, dim)
    result = decode(grouped, view, scale=scale, softcap=softcap, router=router, tally=tally)
    return result.out.view(sequences, heads, dim)


def kernel_view(
    cache: "PagedStates", tables: torch.Tensor, positions: torch.Tensor, whole: torch.Tensor | None = None
) -> "DecodeCache":
    """The caches as the decode kernels take them, copied nowhere; arguments as in :func:`decode_rows`."""
    from llama_surgery.attention.impl.triton.decode.cache import DecodeCache

    def everyone(tensor: torch.Tensor) -> torch.Tensor:
        """(blocks, kv_heads, …) as (sequences, kv_heads, blocks, …)."""
        by_head = tensor.transpose(0, 1)
        return by_head.expand(len(positions), *by_head.shape)

    return DecodeCache(
        cache.config,
        everyone(cache.keys),
        everyone(cache.values),
        positions,
        everyone(cache.scores),
        everyone(cache.first_pages),
        tables,
        None if cache.mean_values is None else everyone(cache.mean_values),
        whole,
    )
