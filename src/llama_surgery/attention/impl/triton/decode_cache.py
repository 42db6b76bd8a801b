"""The preallocated cache of decode: full chunks in tree order, the rest in order of position."""

import dataclasses

import torch
import triton

from llama_surgery.attention.impl.triton.decode_append_kernel import append_kernel
from llama_surgery.attention.impl.triton.decode_blocks import balls_of, feature_blocks, mean_blocks
from llama_surgery.attention.impl.triton.decode_check import check_cache, check_tokens, expect
from llama_surgery.attention.impl.triton.helpers import launching
from llama_surgery.attention.impl.triton.job import page_features
from llama_surgery.attention.impl.triton.layout import build_layout
from llama_surgery.attention.summary import mean_values
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import Layout
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Keys and values of one layer in tensors that never move, so that a CUDA graph can hold them.

    They lie in blocks of one chunk: a sequence's chunks are blocks of its own one after the other
    (:func:`make_cache`), or blocks of a pool that a table names (an engine's paged cache, whose tensors are
    expanded to all sequences). A *stream* is one KV head of one sequence; streams of a sequence follow each
    other. Full chunks are in tree order, the last one in order of position.

    A step is: :func:`append_tokens`, then ``decode``, for every layer; then ``lengths += kept``, where
    ``kept`` is how many of the new tokens stay (in speculative decoding perhaps not all). Layers may share
    ``lengths``. After a step that brings a sequence to the end of a chunk, :func:`fill_chunks`, at the latest
    before ``window`` more tokens are there. The host knows the lengths of its sequences, so nothing is asked
    of the device, and the step of every token is not burdened with what happens once in ``chunk_size``.

    Attributes:
        keys: (sequences, kv_heads, blocks, chunk_size, head_dim), any strides but the last, which is 1.
        values: (sequences, kv_heads, blocks, chunk_size, value_dim), likewise.
        means: (sequences, kv_heads, blocks, balls of a chunk, head_dim), μ of balls, the keys' dtype.
        spreads: (sequences, kv_heads, blocks, balls of a chunk, head_dim / variance_pool), ½·σ², strides of
            ``means``. See :func:`feature_blocks`.
        sink_page: (sequences, kv_heads, blocks) int32, page of a block that holds its first position; looked
            up for a sequence's first chunk.
        lengths: (sequences,) int32, tokens that are settled: all before the step's new ones.
        table: (sequences, chunks) int32, block of every chunk, entries behind the last chunk not looked at;
            None where the blocks are the chunks.
        filled: (sequences,) int32, chunks in tree order; None where someone else lays out chunks.
        mean_values: (sequences, kv_heads, blocks, means of a chunk, value_dim), the values' dtype, of every
            ``summarised`` keys, where the configuration asks for summaries; else None.

    Raises:
        SurgeryError: Tensors that do not fit together.
    """

    config: SurgeryConfig
    keys: torch.Tensor
    values: torch.Tensor
    means: torch.Tensor
    spreads: torch.Tensor
    sink_page: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    mean_values: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_cache(self)

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def streams(self) -> int:
        return self.lengths.shape[0] * self.kv_heads

    @property
    def chunks(self) -> int:
        """Chunks that a sequence has room for."""
        return self.keys.shape[2] if self.table is None else self.table.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.chunks * self.config.chunk_size

    def strides(self) -> tuple[int, ...]:
        """What the kernels know of where keys, values and the table lie."""
        row = 0 if self.table is None else self.table.stride(0)
        return *self.keys.stride()[:4], *self.values.stride()[:4], row

    def mean_strides(self) -> tuple[int | None, ...]:
        """What the kernels know of where mean values of pages or balls lie."""
        if self.mean_values is None:
            return (None,) * 4
        return self.mean_values.stride()[:4]


def make_cache(
    config: SurgeryConfig,
    sequences: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    lengths: torch.Tensor | None = None,
) -> DecodeCache:
    """An empty cache of ``capacity`` tokens a sequence. Keys and values are left unwritten.

    Args:
        capacity: A multiple of ``chunk_size``.
        value_dim: Default ``head_dim``.
        lengths: (sequences,) int32 to share between layers, or None for a tensor of its own.

    Raises:
        SurgeryError: Another capacity or unfit lengths.
    """
    if capacity <= 0 or capacity % config.chunk_size:
        raise SurgeryError(
            f"capacity={capacity}: must be a positive multiple of chunk_size={config.chunk_size}."
        )
    if lengths is None:
        lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
    elif lengths.shape != (sequences,) or lengths.dtype != torch.int32:
        raise SurgeryError(
            f"lengths {tuple(lengths.shape)} {lengths.dtype}: expected ({sequences},) torch.int32."
        )

    def blocks(*size: int) -> torch.Tensor:
        shape = (sequences, kv_heads, capacity // config.chunk_size, *size)
        return torch.empty(shape, dtype=dtype, device=device)

    features = blocks(balls_of(config), head_dim + head_dim // config.variance_pool)
    size = config.summarised
    return DecodeCache(
        config,
        blocks(config.chunk_size, head_dim),
        blocks(config.chunk_size, value_dim or head_dim),
        features[..., :head_dim],
        features[..., head_dim:],
        torch.zeros(sequences, kv_heads, 1, dtype=torch.int32, device=device),
        lengths,
        filled=torch.zeros(sequences, dtype=torch.int32, device=device),
        mean_values=blocks(config.chunk_size // size, value_dim or head_dim) if size else None,
    )


def load_sequence(
    cache: DecodeCache, sequence: int, layout: Layout | None, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Take over a sequence after prefill, into a cache of :func:`make_cache`.

    Whatever was at its place is forgotten.

    Args:
        sequence: Place in the cache.
        layout: The sequence's full chunks, streams are its KV heads; None where there is none.
        keys: (kv_heads, n, head_dim), keys behind the full chunks in order of position.
        values: (kv_heads, n, value_dim).

    Raises:
        SurgeryError: More tokens than the cache has room for.
    """
    config, heads = cache.config, cache.kv_heads
    chunks = 0 if layout is None else layout.chunks
    full = chunks * config.chunk_size
    length = full + keys.shape[1]
    if length > cache.capacity:
        raise SurgeryError(
            f"a sequence of {length} tokens for a cache of {cache.capacity}: make a larger one."
        )
    expect("keys", keys, (heads, keys.shape[1], cache.keys.shape[-1]), cache.keys.dtype, cache.keys.device)
    expect("values", values, (*keys.shape[:2], cache.values.shape[-1]), cache.keys.dtype, cache.keys.device)
    held_keys, held_values = (x[sequence].view(heads, cache.capacity, -1) for x in (cache.keys, cache.values))
    if layout is not None:
        features = page_features(layout.moments, cache.means.dtype, config.variance_pool)
        means, spreads = feature_blocks(features, config, heads)
        held_keys[:, :full] = layout.keys
        held_values[:, :full] = layout.values
        cache.means[sequence, :, :chunks] = means[0]
        cache.spreads[sequence, :, :chunks] = spreads[0]
        if cache.mean_values is not None:
            means = mean_blocks(mean_values(layout.values, config), config, heads)
            cache.mean_values[sequence, :, :chunks] = means[0]
        cache.sink_page[sequence, :, 0] = layout.sink_pages(config.page_size).int()
    held_keys[:, full:length] = keys
    held_values[:, full:length] = values
    cache.lengths[sequence] = length
    if cache.filled is not None:
        cache.filled[sequence] = chunks


def append_tokens(
    cache: DecodeCache, keys: torch.Tensor, values: torch.Tensor, *, longest: int | None = None
) -> None:
    """Write the newest tokens behind the settled ones. ``lengths`` stay; no host synchronisation.

    Args:
        keys: (streams, new, head_dim) after rotary embedding.
        values: (streams, new, value_dim).
        longest: Settled tokens of the longest sequence, where the host knows it: a cache without room for the
            new ones is refused. Where the host does not say, and lengths are on a GPU, tokens without room
            are left out, and :func:`decode` returns NaN for them.

    Raises:
        SurgeryError: Another shape or dtype than the cache's, or no room.
    """
    check_tokens(cache, keys, values, longest)
    streams, rows, dim = keys.shape
    value_dim = values.shape[-1]
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    with launching(keys):
        append_kernel[(streams,)](
            keys,
            values,
            cache.keys,
            cache.values,
            cache.lengths,
            cache.table,
            *keys.stride()[:2],
            *values.stride()[:2],
            *cache.strides(),
            cache.capacity,
            KV_HEADS=cache.kv_heads,
            ROWS=rows,
            ROWS_PAD=triton.next_power_of_2(rows),
            DIM=dim,
            DIM_PAD=triton.next_power_of_2(dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=triton.next_power_of_2(value_dim),
            CHUNK=cache.config.chunk_size,
            PAGED=cache.table is not None,
        )


def fill_chunks(cache: DecodeCache, router: PageRouter | None = None) -> None:
    """Rewrite in tree order, with moments, the oldest chunk of every sequence that is full and is not yet so.

    What is due is decided on the device: shapes are static and nothing is read back, so it can run eagerly or
    be captured in a graph of its own. It costs the layout of one chunk per stream, due or not; where nothing
    is due, nothing changes.

    Args:
        router: Learned corrections, one for every KV head, or None.
    """
    config = cache.config
    assert cache.filled is not None and cache.table is None
    due = ((cache.filled + 1) * config.chunk_size <= cache.lengths) & (cache.filled < cache.chunks)
    of = torch.arange(len(due), device=due.device)
    chunk = cache.filled.clamp_max(cache.chunks - 1).long()
    old_keys, old_values = cache.keys[of, :, chunk], cache.values[of, :, chunk]
    mask = due[:, None, None, None]
    # Memory that holds no chunk yet may hold anything, NaN included.
    known = torch.where(mask, old_keys, 0.0)
    layout = build_layout(known.flatten(0, 1), old_values.flatten(0, 1), config, router)
    features = page_features(layout.moments, cache.means.dtype, config.variance_pool)
    means, spreads = (x.squeeze(2) for x in feature_blocks(features, config, cache.kv_heads))
    replaced = [
        (cache.keys, layout.keys.view_as(old_keys)),
        (cache.values, layout.values.view_as(old_values)),
        (cache.means, means),
        (cache.spreads, spreads),
    ]
    if cache.mean_values is not None:
        fresh_means = mean_blocks(mean_values(layout.values, config), config, cache.kv_heads)
        replaced.append((cache.mean_values, fresh_means.squeeze(2).to(cache.mean_values.dtype)))
    for held, fresh in replaced:
        held[of, :, chunk] = torch.where(mask, fresh, held[of, :, chunk])
    sink_page = layout.sink_pages(config.page_size).int().view(-1, cache.kv_heads)
    first = (due & (chunk == 0))[:, None]
    cache.sink_page[..., 0] = torch.where(first, sink_page, cache.sink_page[..., 0])
    cache.filled.add_(due)
