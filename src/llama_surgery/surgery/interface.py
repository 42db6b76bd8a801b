"""The attention and mask functions that transformers calls on an operated model."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_surgery.attention.api import attend
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.decoding import decode_step, kernels_decode
from llama_surgery.surgery.statistics import Counters
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import ShareListener

#: Attribute of an operated attention module that holds its :class:`LayerSurgery`.
ATTRIBUTE = "_llama_surgery"
#: Keyword by which an operated module's pre-forward hook hands the cache to the attention function.
CACHE_KEYWORD = "llama_surgery_cache"

#: Interface name for each implementation of the dense model. Names must avoid the library's own words.
INTERFACE_NAMES = {
    "eager": "surgery_over_eager",
    "sdpa": "surgery_over_torch",
    "flash_attention_2": "surgery_over_fa2",
    "flash_attention_3": "surgery_over_fa3",
    "flex_attention": "surgery_over_fx",
}

_REFUSED_KEYWORDS = {
    "cu_seq_lens_q": "packed rows",
    "cu_seq_lens_k": "packed rows",
    "position_bias": "additive position biases",
}


@dataclasses.dataclass
class LayerSurgery:
    """What an operated attention module carries.

    Attributes:
        config: The operation's configuration.
        router: Learned corrections, or None.
        counters: Counts by tile size.
        listener: Hears (layer, tile, log shares, block) while calibrating.
    """

    config: SurgeryConfig
    router: PageRouter | None = None
    counters: dict[int, Counters] = dataclasses.field(default_factory=dict)
    listener: Callable[[int, ShareListener], None] | None = None


def register(base: str) -> str:
    """Register the interface over the dense implementation ``base``, if it is not, and return its name."""
    name = INTERFACE_NAMES[base]
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, functools.partial(surgery_attention, base))
        AttentionMaskInterface.register(name, functools.partial(surgery_mask, base))
    return name


def unregister(base: str) -> None:
    """Take the interface out of transformers' tables again."""
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(INTERFACE_NAMES[base], None)


def surgery_mask(base: str, **arguments: Any) -> Any:
    """Mask function: the 2-D padding mask, or None, where attention is plainly causal.

    Any other pattern (sliding windows, packed rows, bidirectional image tokens) is made by the dense
    implementation's own mask function; operated layers refuse it, dense layers use it.
    """
    if arguments.get("mask_function", causal_mask_function) is not causal_mask_function:
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments)
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    kv_length = arguments["kv_length"]
    if mask.shape[-1] < kv_length:
        raise UnsupportedModelError(
            f"an attention mask of {mask.shape[-1]} columns for {kv_length} keys: caches of fixed size are "
            "not supported. Leave cache_implementation unset."
        )
    return mask[:, -kv_length:].bool()


def surgery_attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention function: operated layers follow their topology, all others the dense implementation.

    Args:
        base: Implementation of the dense model.
        module: The attention module.
        query: (batch, heads, new, head_dim).
        key: (batch, kv_heads, n, head_dim): the new keys with a paged cache, else all keys.
        value: (batch, kv_heads, n, value_dim).
        attention_mask: From :func:`surgery_mask`.
        keywords: What transformers passes to attention functions.

    Returns:
        Output (batch, new, heads, value_dim) and None for the weights.

    Raises:
        UnsupportedModelError: A feature the topology cannot honour.
    """
    cache = keywords.pop(CACHE_KEYWORD, _ABSENT)
    layer: LayerSurgery | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        return dense_function(base, module)(module, query, key, value, attention_mask, **keywords)
    _refuse(module, attention_mask, keywords)
    if cache is _ABSENT:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass keywords on to its attention function, so that the "
            "cache cannot be reached. This architecture is not supported."
        )
    return _operated(module, layer, query, key, value, attention_mask, cache, keywords), None


_ABSENT = object()


def dense_function(base: str, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The attention function of the dense implementation ``base``; eager lives in the modeling file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _refuse(module: torch.nn.Module, mask: Any, keywords: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise UnsupportedModelError(
            f"{name} was given a mask that is not plainly causal (packed rows, bidirectional image tokens "
            "or a mask of your own): operated layers support causal attention with padding only. Pass a "
            "2-D attention_mask, one sequence a row."
        )
    if keywords.get("output_attentions"):
        raise UnsupportedModelError("output_attentions: attention weights are never formed. Eject first.")
    if keywords.get("dropout"):
        raise UnsupportedModelError("attention dropout: set attention_dropout=0 or call model.eval().")
    for keyword, what in _REFUSED_KEYWORDS.items():
        if keywords.get(keyword) is not None:
            raise UnsupportedModelError(f"{keyword} ({what}) is not supported by operated layers.")


@torch.compiler.disable
def _operated(
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
    outs = []
    for first, last, size in parts:
        keys = near_keys.shape[1] - (stop - last)  # up to the part's last row
        result = attend(
            query[:, :, first - start : last - start].unflatten(1, (kv_heads, group)).flatten(0, 1),
            near_keys[:, :keys],
            near_values[:, :keys],
            store.layout,
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


def cache_hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Pre-forward hook of operated modules: hands the paged cache on to the attention function."""
    # Its keyword differs between versions and architectures, and some pass it by place.
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    if cache is not None and not isinstance(cache, PagedCache):
        if getattr(cache, "is_compileable", False):
            raise UnsupportedModelError(
                f"{type(cache).__name__}: caches of fixed size are not supported. Leave "
                "cache_implementation and the cache unset."
            )
        cache = None
    if cache is not None:
        paged = cache.layers[module.layer_idx]
        if not isinstance(paged, PagedLayer) or paged.config != getattr(module, ATTRIBUTE).config:
            raise SurgeryError(
                "the paged cache was made for another model or configuration: start with a new one."
            )
        paged.expect()
    return args, {**kwargs, CACHE_KEYWORD: cache}


@contextlib.contextmanager
def listening(layers: dict[int, LayerSurgery], listener: Any):
    """Let ``listener(layer, tile, shares, block)`` hear every selection."""
    for index, layer in layers.items():
        layer.listener = functools.partial(listener, index)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.listener = None
