"""One call of an operated layer: its cache, and its sequences one after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from llama_surgery.attention.executor import executor_of
from llama_surgery.attention.heard import heard_layout
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.calls import untraced
from llama_surgery.surgery.decoding import decode_step, grouped_sinks, kernels_decode
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.rows import Part, parts_of, whole_rows
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout

#: The model's own attention for the last rows of so many keys, if it has any.
Own = Callable[[int, int], Callable[..., torch.Tensor] | None]


@untraced
def run_layer(
    module: torch.nn.Module,
    layer: LayerSurgery,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    cache: PagedCache | None,
    keywords: dict[str, Any],
    own: Own,
) -> torch.Tensor:
    """Attention of an operated layer; arguments are those of an attention function.

    Rows that see everything are computed by the model's own attention, which needs no layout, where ``own``
    has it: those below ``dense_until``, and calls that have no other.

    Returns:
        (batch, new, heads, value_dim), contiguous.
    """
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # As in PyTorch's own attention the states are cast, and nothing that is computed of them.
        dtype = torch.get_autocast_dtype(kind)
        states = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            return run_layer(module, layer, *states, mask, cache, keywords, own)
    layer.move_router(query.device)
    batch, heads, new, _ = query.shape
    kv_heads = key.shape[1]
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
    alone = real and len(taken) == 1 and _own_may_run(layer, paged, query, key, value)
    done = _own_rows(layer, taken[0][0], own, query, key, value, step=step, end=ends[0]) if alone else None
    if done is not None and done.shape[1] == new:
        return done
    if done is None and steps and cache is not None and real:
        call = layer.call(paged, 1, query, value, keywords)
        if kernels_decode(call, paged, query, key, value):
            sinks = grouped_sinks(keywords, kv_heads, batch)
            return decode_step(layer, call, paged, query, key, value, sinks)
    if paged.recording:
        raise SurgeryError(
            "a step can be captured only where the decode kernels run it: a GPU, no float64, no gradients."
        )
    # Allocated as it is returned, so that it is contiguous: some architectures take views of it.
    returned = query.new_zeros(batch, new, heads, value.shape[-1])
    rest = returned
    if done is not None:
        first = done.shape[1]
        returned[:, :first], rest = done, returned[:, first:]
        query = query[:, :, first:]
        if paged.keep:
            key, value = key[:, :, first:], value[:, :, first:]
    for (store, rows, columns), end in zip(taken, ends, strict=True):
        piece = _stored(layer, store, query[rows], key[rows], value[rows], columns, step=step, end=end)
        sinks = grouped_sinks(keywords, kv_heads, len(piece.query))
        for part in piece.parts:
            call = layer.call(paged, part.tile, query, value, keywords)
            states = piece.states(layer, part, kv_heads)
            execute = executor_of(call, *states, sinks)
            result = execute(*states, start=part.start, sink_logit=sinks)
            layer.counts(part.tile).add(result, kv_heads, layer.config, part)
            out = result.out.unflatten(0, (-1, kv_heads)).flatten(1, 2).transpose(1, 2)
            places = piece.rows(part) if piece.columns is None else piece.columns[piece.rows(part)]
            rest[rows][:, places] = out
    return returned


def _own_may_run(
    layer: LayerSurgery, paged: PagedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> bool:
    """May rows that see everything be left to the model's own attention? Not where a backend was asked for by
    name, shares are listened to, a graph is captured, or gradients are recorded."""
    asked = layer.config.backend != "auto" or layer.listener is not None or paged.recording
    recorded = paged.buffers is not None and paged.buffers.recorded  # by an earlier call
    return not asked and not recorded and not differentiable(query, key, value)


def _own_rows(
    layer: LayerSurgery, store: SequenceStore, own: Own, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, *, step: bool, end: int | None,
) -> torch.Tensor | None:  # fmt: skip
    """The first rows of a call by the model's own attention: all if they see everything, else those below
    ``dense_until``. Stores their keys. Returns (batch, rows, heads, value_dim), None if there are none."""
    stop = store.length + key.shape[2]
    start = stop - query.shape[2]
    parts = whole_rows(start, stop, layer.config, step=step, prompt_end=end)
    attention = own(parts[-1].stop - start, parts[-1].stop) if parts else None
    if attention is None:
        return None
    rows, keys = parts[-1].stop - start, parts[-1].stop - store.length
    key, value = key[:, :, :keys], value[:, :, :keys]
    states = store.extend(key, value, layer.router) if store.keep else (key, value)
    for part in parts:
        layer.counts(part.tile).add_whole(part, layer.config, query.shape[0], key.shape[1], query.shape[1])
    return attention(query[:, :, :rows], *states)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """New rows of sequences of one length, whose keys and values are stored by now.

    Attributes:
        query: (sequences, heads, rows, head_dim).
        near: Keys and values (streams, n, dim) up to the last row, back to the first row's near field.
        layout: Full chunks, or None.
        parts: The rows, in order.
        columns: Columns of the call that hold them, or None for all.
    """

    query: torch.Tensor
    near: tuple[torch.Tensor, torch.Tensor]
    layout: Layout | None
    parts: list[Part]
    columns: torch.Tensor | None

    def rows(self, part: Part) -> slice:
        """Where a part's rows are among the piece's."""
        start = self.parts[0].start
        return slice(part.start - start, part.stop - start)

    def states(
        self, layer: LayerSurgery, part: Part, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout | None]:
        """A part's queries by stream, keys and values up to its last row, and full chunks."""
        query, after = self.query[:, :, self.rows(part)], self.parts[-1].stop - part.stop
        keys, values = (x[:, : x.shape[1] - after] for x in self.near)
        layout = self.layout
        if layer.executed is not None and layout is not None:
            layout = heard_layout(layout, layer.executed, query, values, part.tile)
        return query.unflatten(1, (kv_heads, -1)).flatten(0, 1), keys, values, layout


def _stored(
    layer: LayerSurgery,
    store: SequenceStore,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    columns: torch.Tensor | None,
    *,
    step: bool,
    end: int | None,
) -> _Piece:
    """Store what a call brings of sequences of one length, and cut their rows into parts."""
    if columns is not None:
        skip = key.shape[2] - query.shape[2]  # keys before the queries, where there is no paged cache
        key, value = key[:, :, columns], value[:, :, columns]
        columns = columns[columns >= skip] - skip
        query = query[:, :, columns]
    stop = store.length + key.shape[2]
    start, size = stop - query.shape[2], layer.config.chunk_size
    parts = list(parts_of(start, stop, layer.config, step=step, prompt_end=end))
    since = closed_chunks(start, layer.config, parts[0].tile) if parts else store.length // size
    near = store.append(key, value, since * size, layer.router)
    return _Piece(query, near, store.layout, parts, columns)
