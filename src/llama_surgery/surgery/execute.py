"""One call of an operated layer: its cache, and its sequences one after the other."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llama_surgery.attention.executor import executor_of
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.calls import running_call, untraced
from llama_surgery.surgery.decoding import decode_step, grouped_sinks, kernels_decode
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.rows import Part, parts_of, whole_rows
from llama_surgery.surgery.statistics import Counted, count_whole
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.surgery.supported import refuse
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout

#: The model's own attention of a module: f(module, keywords, query, key, value), see
#: ``interface._own_attention``; and that for the last rows of so many keys, if there is any.
Own = Callable[..., torch.Tensor]
FindOwn = Callable[[int, int], Own | None]


@untraced
def run_layer(
    module: torch.nn.Module,
    layer: LayerSurgery,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    keywords: dict[str, Any],
    own: FindOwn,
) -> torch.Tensor:
    """Attention of an operated layer; arguments are those of an attention function.

    Rows that see everything are computed by the model's own attention, which needs no layout, where ``own``
    has it: those below ``dense_until``, and calls that have no other, of which the other layers are told.

    Returns:
        (batch, new, heads, value_dim), contiguous.

    Raises:
        UnsupportedModelError: A feature the topology cannot honour.
    """
    call, given = running_call(), None
    if call is not None and call.cache is not None:
        given, call.handed = call.handed, None
        if given is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} calls its attention function twice for one update of the cache, or "
                "fills none or another than the model was given: not supported."
            )
    if call is not None and call.whole is not None:
        out = call.whole(module, layer, given, query, key, value, mask, keywords)
        if out is not None:
            return out
    refuse(module, mask, keywords)
    if given is not None and key.shape[2] != query.shape[2]:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {query.shape[2]} new tokens attend to {key.shape[2]} new keys, so "
            "to something else than the text before them. Only self-attention can be operated."
        )
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # As in PyTorch's own attention the states are cast, and nothing that is computed of them.
        dtype = torch.get_autocast_dtype(kind)
        states = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        if call is not None:
            call.handed = given
        with torch.autocast(kind, enabled=False):
            out = run_layer(module, layer, *states, mask, keywords, own)
        if call is not None:
            call.whole = None  # the other layers' states are not cast yet
        return out
    layer.move_router(query.device)
    batch, heads, new, _ = query.shape
    kv_heads = key.shape[1]
    ends = None
    if given is not None:
        assert call is not None and call.cache is not None
        paged, ends = given, call.cache.prompt_ends
        step = paged.recording or (ends is None and paged.slots > 0 and new == 1)
    else:
        # Without a cache all keys are new: a fresh one holds them for this call alone.
        paged = PagedLayer(layer.config, keep=False)
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
    done = None
    if alone:
        end = ends[0]
        done, whole = _own_rows(module, layer, paged, own, query, key, value, mask, keywords, step, end)
        if whole is not None:
            if call is not None:
                call.whole = whole
            return done
    if done is None and steps and given is not None and real:
        how = layer.call(paged, 1, query, value, keywords)
        sinks = grouped_sinks(keywords, kv_heads, batch)
        if kernels_decode(how, paged, query, key, value, sinks):
            return decode_step(layer, how, paged, query, key, value, sinks)
    if paged.recording:
        raise SurgeryError(
            "a step can be captured only where the decode kernels run it: a GPU, no float64, no gradients."
        )
    first = 0 if done is None else done.shape[1]
    query = query[:, :, first:]
    if done is not None and paged.keep:
        key, value = key[:, :, first:], value[:, :, first:]
    found = []
    for (store, rows, columns), end in zip(taken, ends, strict=True):
        piece = _stored(layer, store, query[rows], key[rows], value[rows], columns, step=step, end=end)
        sinks = grouped_sinks(keywords, kv_heads, len(piece.query))
        for part in piece.parts:
            how = layer.call(paged, part.tile, query, value, keywords)
            states = piece.states(layer, part, kv_heads)
            execute = executor_of(how, *states, sinks)
            result = execute(*states, start=part.start, sink_logit=sinks)
            layer.counts(part.tile).add(result, kv_heads, layer.config, part)
            places = piece.rows(part) if piece.columns is None else piece.columns[piece.rows(part)]
            out = result.out.reshape(-1, heads, *result.out.shape[2:]).transpose(1, 2)
            found.append((rows, places, out))
    if done is None and real and len(found) == 1:
        return out.contiguous()
    # Allocated as it is returned, so that it is contiguous: some architectures take views of it.
    returned = query.new_zeros(batch, new, heads, value.shape[-1])
    if done is not None:
        returned[:, :first] = done
    for rows, places, out in found:
        returned[:, first:][rows][:, places] = out
    return returned


def _own_may_run(
    layer: LayerSurgery, paged: PagedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> bool:
    """May rows that see everything be left to the model's own attention? Not where a backend was asked for by
    name, a graph is captured, or gradients are recorded."""
    asked = layer.config.backend != "auto" or paged.recording
    recorded = paged.buffers is not None and paged.buffers.recorded  # by an earlier call
    return not asked and not recorded and not differentiable(query, key, value)


def _own_rows(
    module: torch.nn.Module, layer: LayerSurgery, paged: PagedLayer, own: FindOwn, query: torch.Tensor,
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, keywords: dict[str, Any], step: bool,
    end: int | None,
) -> tuple[torch.Tensor | None, Callable[..., torch.Tensor | None] | None]:  # fmt: skip
    """The first rows of a call by the model's own attention: all if they see everything, else those below
    ``dense_until``. Stores their keys. Returns (batch, rows, heads, value_dim), None if there are none, and
    what other layers do if they are all."""
    (batch, heads, new, _), kv_heads = query.shape, key.shape[1]
    length = paged.stores[0].length
    start = length + key.shape[2] - new
    parts = whole_rows(start, start + new, layer.config, step=step, prompt_end=end)
    stop = parts[-1].stop if parts else start
    attention = own(stop - start, stop) if parts else None
    if attention is None:
        return None, None
    counted = tuple(count_whole(part, layer.config, batch, kv_heads, heads) for part in parts)
    layer.count_whole(counted)
    states = key[:, :, : stop - length], value[:, :, : stop - length]
    if paged.keep:
        states = paged.extend(*states, layer.router)
    out = attention(module, keywords, query[:, :, : stop - start], *states)
    whole = stop == start + new
    return out, _same_again(layer.config, start, mask, query, key, attention, counted) if whole else None


def _same_again(
    config: SurgeryConfig, start: int, mask: Any, query: torch.Tensor, key: torch.Tensor, attention: Own,
    counted: Iterable[Counted],
) -> Callable[..., torch.Tensor | None]:  # fmt: skip
    """What the other layers of a call do, all of whose rows see everything, as its first operated layer did.

    Args:
        config: Of that layer, as all that follows: cached tokens of every sequence, the mask as transformers
            gave it, queries and new keys for their shapes and dtype, the model's own attention, and what was
            counted.

    Returns:
        f(module, layer, paged, query, key, value, mask, keywords): (batch, new, heads, value_dim), or None
        where a layer differs.
    """
    shapes = query.shape, key.shape, query.dtype

    def attend(
        module: torch.nn.Module, layer: LayerSurgery, paged: PagedLayer | None, query: torch.Tensor,
        key: torch.Tensor, value: torch.Tensor, given: Any, keywords: dict[str, Any],
    ) -> torch.Tensor | None:  # fmt: skip
        alike = given is mask and layer.config is config and (query.shape, key.shape, query.dtype) == shapes
        if not alike or torch.is_grad_enabled():
            return None
        if paged is not None:
            states = paged.follow(start, key, value, layer.router)
            if states is None:
                return None
            key, value = states
        layer.count_whole(counted)
        return attention(module, keywords, query, key, value)

    return attend


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
        return query.unflatten(1, (kv_heads, -1)).flatten(0, 1), keys, values, self.layout


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
    closed = closed_chunks(stop - 1, layer.config, parts[-1].tile) if parts else 0
    near = store.append(key, value, since * size, layer.router, closed)
    return _Piece(query, near, store.layout if closed else None, parts, columns)
