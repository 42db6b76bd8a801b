"""The attention and mask functions that transformers calls on an operated model."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.surgery.execute import run_layer
from llama_surgery.surgery.layer import ATTRIBUTE, LayerSurgery

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
    return run_layer(module, layer, query, key, value, attention_mask, cache, keywords), None


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
