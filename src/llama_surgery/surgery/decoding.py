"""Decode steps of an operated layer through the Triton kernels: one launch for all sequences of a batch."""

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.rows import Part, sparse_parts
from llama_surgery.surgery.statistics import Counted, count_whole

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.decode.cache import DecodeCache


def grouped_sinks(keywords: dict[str, Any], kv_heads: int, sequences: int) -> torch.Tensor | None:
    """(streams, heads) attention-sink parameters from a module's own (heads,), where it has any."""
    sinks = keywords.get("s_aux")
    return None if sinks is None else sinks.view(kv_heads, -1).repeat(sequences, 1)


def kernels_decode(
    call: AttentionCall,
    paged: PagedLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
) -> bool:
    """Can the decode kernels run this call? What they refuse is executed as every other call.

    Args:
        call: How it is executed, in tiles of one row.
        paged: The layer's cache.
        query: (batch, heads, new, head_dim).
        key: (batch, kv_heads, new, head_dim).
        value: (batch, kv_heads, new, value_dim).
        sinks: From :func:`grouped_sinks`.
    """
    buffers = paged.buffers
    if call.executor != "triton" or buffers is None or buffers.empty:
        return False
    if not buffers.decide(buffers.keys, buffers.values):
        return False
    from llama_surgery.attention.impl.triton.decode.launch import decode_obstacle

    learned = {} if call.router is None else call.router.tensors()
    recorded = differentiable(key, value, sinks, buffers.keys, buffers.values, *learned.values())
    return not recorded and decode_obstacle(call.config, query) is None


def decode_step(
    layer: LayerSurgery,
    call: AttentionCall,
    paged: PagedLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the newest tokens, which are real for every sequence. Asks nothing of the device.

    Shapes are those of :func:`kernels_decode` and :func:`grouped_sinks`.

    Returns:
        (batch, new, heads, value_dim), contiguous.
    """
    from llama_surgery.attention.impl.triton.decode.cache import append_tokens
    from llama_surgery.attention.impl.triton.decode.launch import decode

    (batch, heads, rows, _), kv_heads = query.shape, key.shape[1]
    whole = sees_everything(paged, rows)
    if not (whole or paged.recording):
        paged.lay_out(call.router)
    buffers, lengths = paged.buffers, paged.device_lengths()
    assert buffers is not None
    cache = cache_view(buffers, call.config, kv_heads, lengths, whole=whole)
    append_tokens(cache, key.flatten(0, 1), value.flatten(0, 1), longest=max(paged.lengths))
    result = decode(
        query.unflatten(1, (kv_heads, heads // kv_heads)).flatten(0, 1),
        cache,
        scale=call.scale,
        softcap=call.softcap,
        sink_logit=sinks,
        router=call.router,
        tally=None if whole else tally_of(layer, paged),
        advance=True,
    )
    if not paged.recording:
        settle([(layer, paged)], rows)
    return result.out.view(batch, heads, rows, -1).transpose(1, 2).contiguous()


def sees_everything(paged: PagedLayer, rows: int) -> bool:
    """Do the next ``rows`` tokens of every sequence see all before them, if they are decode steps?"""
    longest = max(paged.lengths)
    return not sparse_parts([Part(longest, longest + rows, 1)], paged.config)


def cache_view(
    buffers: PageBuffers, config: SurgeryConfig, kv_heads: int, lengths: torch.Tensor, *, whole: bool = False
) -> "DecodeCache":
    """A layer's tensors as the decode kernels read them. Nothing is copied.

    Args:
        buffers: Hold keys and values; their streams are (sequence, KV head) flattened.
        config: The topology of the call.
        kv_heads: Streams of a sequence.
        lengths: (sequences,) int32 on the buffers' device, settled tokens.
        whole: Without what is known of pages: rows see everything, and no chunk need be laid out.
    """
    from llama_surgery.attention.impl.triton.decode.cache import DecodeCache

    def by_chunk(held: torch.Tensor, of_chunk: int) -> torch.Tensor:
        """(streams, …, dim) as (sequences, kv_heads, chunks, ``of_chunk``, dim)."""
        return held.view(-1, kv_heads, held.shape[1] // of_chunk, of_chunk, held.shape[-1])

    keys, values, *pages = buffers.read_by_kernels(whole=whole)
    states = by_chunk(keys, config.chunk_size), by_chunk(values, config.chunk_size), lengths
    if whole:
        return DecodeCache(config, *states)
    features, sink_page, *means = pages
    return DecodeCache(
        config,
        *states,
        by_chunk(features, config.pages_per_chunk),
        sink_page.view(-1, kv_heads, 1),
        mean_values=by_chunk(*means, config.pages_per_chunk) if means else None,
    )


def settle(layers: list[tuple[LayerSurgery, PagedLayer]], rows: int) -> None:
    """What the host does about a step that is launched: count it, but for pages that are tallied.

    Args:
        layers: Those that took it, alike in all but their KV heads, and their caches.
        rows: Tokens of the step.
    """
    first, config = layers[0][1], layers[0][0].config
    whole, lengths = sees_everything(first, rows), Counter(first.lengths)
    parts = [(Part(length, length + rows, 1), sequences) for length, sequences in lengths.items()]

    @functools.cache
    def counted(kv_heads: int) -> list[Counted]:
        return [count_whole(part, config, sequences, kv_heads, kv_heads) for part, sequences in parts]

    for layer, paged in layers:
        if whole:
            layer.count_whole(counted(paged.kv_heads))
        else:
            for part, sequences in parts:
                layer.counts(1).count_rows(part.start, part.stop, config, 1, sequences)
        paged.advance(rows, layer.router)


def tally_of(layer: LayerSurgery, paged: PagedLayer) -> torch.Tensor:
    """(2, kv_heads) int64, to which the layer's steps add the pages they opened and read."""
    return layer.counts(1).tally(paged.kv_heads, layer.config.page_size, paged.device)
