"""One call of an operated layer: its cache, and its sequences one after the other."""

import functools
from typing import Any

import torch

from llama_surgery.attention.api import attend
from llama_surgery.attention.heard import heard_layout
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.decoding import decode_step, kernels_decode
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.rows import Part, parts_of
from llama_surgery.surgery.statistics import Counters
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import closed_chunks


def run_layer(
    module: torch.nn.Module,
    layer: LayerSurgery,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    cache: PagedCache | None,
    keywords: dict[str, Any],
) -> torch.Tensor:
    batch, heads, new, _ = query.shape
    if layer.hear_queries is not None:
        layer.hear_queries(query, key.shape[1])
    ends = None if cache is None else cache.prompt_ends
    if cache is not None:
        paged = cache.layers[module.layer_idx]
        step = paged.recording or (ends is None and paged.slots > 0 and new == 1)
    else:
        # Without a cache all keys are new: a fresh one holds them for this call alone.
        paged = PagedLayer(layer.config, keep=False)
        paged.expect()
        step = key.shape[2] > new and new == 1
    taken = paged.take(mask, batch, key.shape[2], (key, value), apart=ends is not None and len(ends) > 1)
    ends = [None] if ends is None else ends
    if len(ends) < len(taken):
        ends = ends * len(taken)
    steps = all(
        step or (end is not None and store.length >= end)
        for (store, _, _), end in zip(taken, ends, strict=True)
    )
    real = all(columns is None for _, _, columns in taken)
    if steps and cache is not None and real and kernels_decode(layer, paged, query, key, value):
        return decode_step(layer, paged, query, key, value, keywords)
    if paged.recording:
        raise SurgeryError(
            "a step can be captured only where the decode kernels run it: a GPU, no float64, no gradients."
        )
    # Allocated as it is returned, so that it is contiguous: some architectures take views of it.
    returned = query.new_zeros(batch, new, heads, value.shape[-1])
    out = returned.transpose(1, 2)
    for (store, rows, columns), end in zip(taken, ends, strict=True):
        q, k, v = query[rows], key[rows], value[rows]
        skip = key.shape[2] - new  # keys before the queries, where there is no paged cache
        if columns is not None:
            k, v = k[:, :, columns], v[:, :, columns]
            columns = columns[columns >= skip] - skip
            q = q[:, :, columns]
        if q.shape[2] == 0:
            if k.shape[2]:
                since = store.length // layer.config.chunk_size * layer.config.chunk_size
                store.append(k, v, since, layer.router)
            continue
        start = store.length + k.shape[2] - q.shape[2]
        parts = parts_of(start, start + q.shape[2], layer.config, step=step, prompt_end=end)
        result = _attend_sequences(layer, store, q, k, v, list(parts), keywords)
        if columns is None:
            out[rows] = result
        else:
            out[rows][:, :, columns] = result
    return returned


def _attend_sequences(
    layer: LayerSurgery,
    store: SequenceStore,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: list[Part],
    keywords: dict[str, Any],
) -> torch.Tensor:
    """Operated attention of sequences of one length: (sequences, heads, rows, value_dim)."""
    sequences, heads, _, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    start, stop = parts[0].start, parts[-1].stop
    since = closed_chunks(start, layer.config, parts[0].tile) * layer.config.chunk_size
    near_keys, near_values = store.append(key, value, since, layer.router)
    sinks = keywords.get("s_aux")
    if sinks is not None:
        sinks = sinks.detach().view(kv_heads, group).repeat(sequences, 1)
    outs, layout = [], store.layout
    for part in parts:
        heard = layout
        if layer.executed is not None and layout is not None:
            heard = heard_layout(layout, layer.executed, query, value, part.tile)
        keys = near_keys.shape[1] - (stop - part.stop)  # up to the part's last row
        result = attend(
            query[:, :, part.start - start : part.stop - start].unflatten(1, (kv_heads, group)).flatten(0, 1),
            near_keys[:, :keys],
            near_values[:, :keys],
            heard,
            config=part.config,
            start=part.start,
            tile=part.tile,
            scale=keywords.get("scaling"),
            softcap=keywords.get("softcap"),
            sink_logit=sinks,
            listener=None if layer.listener is None else functools.partial(layer.listener, part.tile),
            router=layer.router,
        )
        counters = layer.counters.setdefault(part.tile, Counters())
        counters.add(result, kv_heads, layer.config.page_size)
        outs.append(result.out.unflatten(0, (sequences, kv_heads)).flatten(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
