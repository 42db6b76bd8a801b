"""The preallocated cache of decode: full chunks in tree order, the rest in order of position."""

import dataclasses

import torch
import triton

from llama_surgery.attention.impl.triton.decode_kernels import append_kernel
from llama_surgery.attention.impl.triton.job import page_features
from llama_surgery.attention.impl.triton.layout import build_layout
from llama_surgery.attention.impl.triton.prefill import device_of
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import Layout


@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Keys and values of one layer in tensors that never move, so that a CUDA graph can hold them.

    A *stream* is one KV head of one sequence; streams of a sequence follow each other. Slots up to
    ``filled * chunk_size`` are in tree order chunk by chunk; behind them slot and position are one.

    A step is: :func:`append_tokens`, then ``decode``, for every layer; then ``lengths += kept``, where
    ``kept`` is how many of the new tokens stay (in speculative decoding perhaps not all). Layers may share
    ``lengths``. After a step that brings a sequence to the end of a chunk, :func:`fill_chunks`, at the latest
    before ``window`` more tokens are there. The host knows the lengths of its sequences, so nothing is asked
    of the device, and the step of every token is not burdened with what happens once in ``chunk_size``.

    Attributes:
        keys: (streams, capacity, head_dim).
        values: (streams, capacity, value_dim).
        features: (streams, 2, capacity / moment_size, head_dim), μ and α·½·σ² of balls, the keys' dtype.
        sink_page: (streams,) int32, the page that holds position 0.
        lengths: (sequences,) int32, tokens that are settled: all before the step's new ones.
        filled: (sequences,) int32, chunks in tree order; None where someone else lays out chunks.
    """

    config: SurgeryConfig
    keys: torch.Tensor
    values: torch.Tensor
    features: torch.Tensor
    sink_page: torch.Tensor
    lengths: torch.Tensor
    filled: torch.Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0] // self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]


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
    streams, balls = sequences * kv_heads, capacity // config.ball_size
    return DecodeCache(
        config,
        torch.empty(streams, capacity, head_dim, dtype=dtype, device=device),
        torch.empty(streams, capacity, value_dim or head_dim, dtype=dtype, device=device),
        torch.empty(streams, 2, balls, head_dim, dtype=dtype, device=device),
        torch.zeros(streams, dtype=torch.int32, device=device),
        lengths,
        torch.zeros(sequences, dtype=torch.int32, device=device),
    )


def load_sequence(
    cache: DecodeCache, sequence: int, layout: Layout | None, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Take over a sequence after prefill; whatever was at its place is forgotten.

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
    streams = slice(sequence * heads, (sequence + 1) * heads)
    if layout is not None:
        features = page_features(layout.moments, config.alpha, cache.features.dtype)
        cache.keys[streams, :full] = layout.keys
        cache.values[streams, :full] = layout.values
        cache.features[streams, :, : features.shape[2]] = features
        cache.sink_page[streams] = layout.sink_pages(config.page_size).int()
    cache.keys[streams, full:length] = keys
    cache.values[streams, full:length] = values
    cache.lengths[sequence] = length
    if cache.filled is not None:
        cache.filled[sequence] = chunks


def append_tokens(cache: DecodeCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write the newest tokens behind the settled ones. ``lengths`` stay; no host synchronisation.

    Tokens beyond the capacity are dropped: the host, which knows its lengths, must not let it come to that.

    Args:
        keys: (streams, new, head_dim) after rotary embedding.
        values: (streams, new, value_dim).
    """
    streams, rows, dim = keys.shape
    value_dim = values.shape[-1]
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    with device_of(keys):
        append_kernel[(streams,)](
            keys,
            values,
            cache.keys,
            cache.values,
            cache.lengths,
            *keys.stride()[:2],
            *values.stride()[:2],
            *cache.keys.stride()[:2],
            *cache.values.stride()[:2],
            cache.capacity,
            KV_HEADS=cache.kv_heads,
            ROWS=rows,
            ROWS_PAD=triton.next_power_of_2(rows),
            DIM=dim,
            DIM_PAD=triton.next_power_of_2(dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=triton.next_power_of_2(value_dim),
        )


def fill_chunks(cache: DecodeCache) -> None:
    """Rewrite in tree order, with moments, the oldest chunk of every sequence that is full and is not yet so.

    What is due is decided on the device: shapes are static and nothing is read back, so it can run eagerly or
    be captured in a graph of its own. It costs the layout of one chunk per stream, due or not; where nothing
    is due, nothing changes.
    """
    config = cache.config
    size = config.chunk_size
    chunks = cache.capacity // size
    assert cache.filled is not None
    due = (cache.filled + 1) * size <= cache.lengths
    stream = torch.arange(cache.keys.shape[0], device=cache.keys.device)
    due_stream = due.repeat_interleave(cache.kv_heads)
    chunk = cache.filled.clamp_max(chunks - 1).repeat_interleave(cache.kv_heads).long()
    keys, values = (x.unflatten(1, (chunks, size)) for x in (cache.keys, cache.values))
    features = cache.features.unflatten(2, (chunks, -1)).transpose(1, 2)
    old_keys, old_values = keys[stream, chunk], values[stream, chunk]
    mask = due_stream[:, None, None]
    # Memory that holds no chunk yet may hold anything, NaN included.
    layout = build_layout(torch.where(mask, old_keys, 0.0), old_values, config)
    fresh = page_features(layout.moments, config.alpha, cache.features.dtype)
    keys[stream, chunk] = torch.where(mask, layout.keys, old_keys)
    values[stream, chunk] = torch.where(mask, layout.values, old_values)
    features[stream, chunk] = torch.where(mask[..., None], fresh, features[stream, chunk])
    sink_page = layout.sink_pages(config.page_size).int()
    cache.sink_page.copy_(torch.where(due_stream & (chunk == 0), sink_page, cache.sink_page))
    cache.filled.add_(due)
