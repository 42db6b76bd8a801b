"""One call of an operated layer: its cache, the size of its tiles, its sequences one after the other."""

import functools
from typing import Any

import torch

from llama_surgery.attention.api import attend
from llama_surgery.attention.heard import heard_layout
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.decoding import decode_step, kernels_decode
from llama_surgery.surgery.layer import LayerSurgery
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
    settle = False
    if cache is not None:
        paged = cache.layers[module.layer_idx]
        decode = paged.slots > 0 and new <= cache.decode_rows
        settle = cache.settle_last_tile
    else:
        # Without a cache all keys are new: a fresh one holds them for this call alone.
        paged = PagedLayer(layer.config, keep=False)
        paged.expect()
        decode = key.shape[2] > new and new == 1
    tile = 1 if decode else layer.config.tile
    taken = paged.take(mask, batch, key.shape[2], (key, value))
    real = all(columns is None for _, _, columns in taken)
    if decode and cache is not None and real and kernels_decode(layer, paged, query, key, value):
        return decode_step(layer, paged, query, key, value, keywords)
    if paged.recording:
        raise SurgeryError(
            "a step can be captured only where the decode kernels run it: a GPU, no float64, no gradients, "
            "no coarse_to_fine."
        )
    # Allocated as it is returned, so that it is contiguous: some architectures take views of it.
    returned = query.new_zeros(batch, new, heads, value.shape[-1])
    out = returned.transpose(1, 2)
    for store, rows, columns in taken:
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
        result = _attend_sequences(module, layer, store, q, k, v, tile, settle, keywords)
        if columns is None:
            out[rows] = result
        else:
            out[rows][:, :, columns] = result
    return returned


def _attend_sequences(
    module: torch.nn.Module,
    layer: LayerSurgery,
    store: SequenceStore,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tile: int,
    settle: bool,
    keywords: dict[str, Any],
) -> torch.Tensor:
    """Operated attention of sequences of one length: (sequences, heads, rows, value_dim).

    With ``settle``, rows of the last tile are decode steps where the call leaves it incomplete.
    """
    sequences, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    config = layer.config
    start = store.length + key.shape[2] - rows
    since = closed_chunks(start, config, tile) * config.chunk_size
    near_keys, near_values = store.append(key, value, since, layer.router)
    sinks = keywords.get("s_aux")
    if sinks is not None:
        sinks = sinks.detach().view(kv_heads, group).repeat(sequences, 1)
    stop = start + rows
    parts = [(start, stop, tile)]
    if settle and tile > 1 and stop % tile:
        border = max(start, stop - stop % tile)
        parts = [part for part in ((start, border, tile), (border, stop, 1)) if part[0] < part[1]]
    outs, layout = [], store.layout
    if layer.executed is not None and layout is not None:
        layout = heard_layout(layout, layer.executed, query, value, tile)
    for first, last, size in parts:
        keys = near_keys.shape[1] - (stop - last)  # up to the part's last row
        result = attend(
            query[:, :, first - start : last - start].unflatten(1, (kv_heads, group)).flatten(0, 1),
            near_keys[:, :keys],
            near_values[:, :keys],
            layout,
            config=config,
            start=first,
            tile=size,
            scale=keywords.get("scaling"),
            softcap=keywords.get("softcap"),
            sink_logit=sinks,
            listener=None if layer.listener is None else functools.partial(layer.listener, size),
            router=layer.router,
        )
        counters = layer.counters.setdefault(size, Counters())
        counters.add(result, kv_heads, config.page_size)
        outs.append(result.out.unflatten(0, (sequences, kv_heads)).flatten(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
