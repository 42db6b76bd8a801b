"""Operated attention on an engine's paged cache by the Triton kernels.

Decode rows read keys, values and features where the engine put them, through block tables: static shapes, no
host synchronisation, so that a step can be captured in a CUDA graph.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch

from llama_surgery.attention.executor import kernel_features, kernel_moments
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.paged import PagedStates
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.router import PageRouter

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.decode_cache import DecodeCache

#: The side cache of a chunk begins and ends at multiples of so many bytes, so that loads are wide.
ALIGNMENT = 64


def kernel_side_bytes(config: SurgeryConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the side cache for one chunk of one KV head.

    They are features and mean values of pages, if any, both in the keys' dtype, the chunk's
    order (int16) and the page of its first token (int32).
    """
    return -(-(_order_end(config, head_dim, dtype) + 4) // ALIGNMENT) * ALIGNMENT


def _order_end(config: SurgeryConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the side cache up to the end of the order, a multiple of 4."""
    halves = config.pages_per_chunk * _feature_width(config, head_dim) + config.summaries_per_chunk * head_dim
    size = halves * dtype.itemsize
    return size + size % 4 + 2 * (config.chunk_size + config.chunk_size % 2)


@dataclasses.dataclass(frozen=True)
class KernelStates(PagedStates):
    """One layer's caches, of which the side cache holds what the kernels score pages by.

    Attributes:
        states: (blocks, kv_heads, chunk_size, 2 * head_dim), keys before values, any strides but the last.
        side: (blocks, kv_heads, kernel_side_bytes / 4 or more) float32, the last stride 1.
        config: The topology.
    """

    def _keep(self, blocks: torch.Tensor, layout: Layout) -> None:
        heads = self.states.shape[1]
        features = kernel_features(layout.moments, self.config, self.states.dtype)
        self._features[blocks] = features.unflatten(0, (-1, heads))
        first = layout.sink_pages(self.config.page_size).int()
        self.first_pages[blocks] = first.unflatten(0, (-1, heads))

    @property
    def first_pages(self) -> torch.Tensor:
        """(blocks, kv_heads) int32: the page that holds a chunk's first token."""
        return self.side.view(torch.int32)[
            ..., _order_end(self.config, self.head_dim, self.states.dtype) // 4
        ]

    @property
    def means(self) -> torch.Tensor:
        """(blocks, kv_heads, pages, head_dim): μ of the pages of full chunks."""
        return self._features[..., : self.head_dim]

    @property
    def spreads(self) -> torch.Tensor:
        """(blocks, kv_heads, pages, head_dim / variance_pool): ½·σ², likewise."""
        return self._features[..., self.head_dim :]

    @property
    def mean_values(self) -> torch.Tensor | None:
        """(blocks, kv_heads, pages of a chunk, head_dim), the keys' dtype; None without summaries."""
        if self.config.summary == "none":
            return None
        first = self.config.pages_per_chunk * _feature_width(self.config, self.head_dim)
        halves = self.side.view(self.states.dtype)[..., first:]
        return halves[..., : self.config.summaries_per_chunk * self.head_dim].unflatten(
            -1, (-1, self.head_dim)
        )

    def layout(self, blocks: torch.Tensor) -> Layout:
        """Order, features, moments and mean values of full chunks; keys and values stay where they are."""
        none = self.states[:0, 0]
        features = self._features[blocks].transpose(0, 1).flatten(1, 2)
        moments = kernel_moments(features, self.config)
        return Layout(none, none, self.order(blocks), moments, features, self.means_of(blocks))

    @property
    def _features(self) -> torch.Tensor:
        width = _feature_width(self.config, self.head_dim)
        halves = self.side.view(self.states.dtype)[..., : self.config.pages_per_chunk * width]
        return halves.unflatten(-1, (-1, width))

    @property
    def _orders(self) -> torch.Tensor:
        end = _order_end(self.config, self.head_dim, self.states.dtype)
        stop = end // 2 - self.config.chunk_size % 2
        return self.side.view(torch.int16)[..., stop - self.config.chunk_size : stop]


def _feature_width(config: SurgeryConfig, head_dim: int) -> int:
    return head_dim + head_dim // config.variance_pool


def decode_rows(
    queries: torch.Tensor,
    cache: KernelStates,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    router: PageRouter | None = None,
    tally: torch.Tensor | None = None,
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

    Returns:
        (sequences, heads, head_dim), contiguous, the queries' dtype.

    Raises:
        SurgeryError: Shapes or dtypes that do not fit, or a rule that the kernels do not run.
    """
    from llama_surgery.attention.impl.triton.decode import decode

    sequences, heads, dim = queries.shape
    kv_heads = cache.states.shape[1]
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
    view = kernel_view(cache, tables, positions)
    grouped = queries.reshape(sequences * kv_heads, heads // kv_heads, 1, dim)
    result = decode(grouped, view, scale=scale, softcap=softcap, router=router, tally=tally)
    return result.out.view(sequences, heads, dim)


def kernel_view(cache: KernelStates, tables: torch.Tensor, positions: torch.Tensor) -> "DecodeCache":
    """The caches as the decode kernels take them, copied nowhere; arguments as in :func:`decode_rows`."""
    from llama_surgery.attention.impl.triton.decode_cache import DecodeCache

    def everyone(tensor: torch.Tensor) -> torch.Tensor:
        """(blocks, kv_heads, …) as (sequences, kv_heads, blocks, …)."""
        by_head = tensor.transpose(0, 1)
        return by_head.expand(len(positions), *by_head.shape)

    return DecodeCache(
        cache.config,
        everyone(cache.states[..., : cache.head_dim]),
        everyone(cache.states[..., cache.head_dim :]),
        everyone(cache.means),
        everyone(cache.spreads),
        everyone(cache.first_pages),
        positions,
        tables,
        None if cache.mean_values is None else everyone(cache.mean_values),
    )
