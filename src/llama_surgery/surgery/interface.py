"""The attention and mask functions that transformers calls on a model whose attention is replaced."""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.calls import current_call, running_call
from llama_surgery.surgery.cudnn import PLANNED, without_cudnn
from llama_surgery.surgery.execute import Own, run_layer
from llama_surgery.surgery.layer import ATTRIBUTE, LayerSurgery
from llama_surgery.surgery.supported import crosses

#: Interface name for each implementation of the dense model. Names must avoid the library's own words.
INTERFACE_NAMES = {
    "eager": "surgery_over_eager",
    "sdpa": "surgery_over_torch",
    "flash_attention_2": "surgery_over_fa2",
    "flash_attention_3": "surgery_over_fa3",
    "flex_attention": "surgery_over_fx",
}
_BASES = {name: base for base, name in INTERFACE_NAMES.items()}

#: Why caches of transformers that have all their room from the start are refused.
FIXED_SIZE = "caches of fixed size are not supported. Leave cache_implementation and the cache unset."

#: Attribute of a mask in full that is plainly causal: the padding mask that says the same, or None.
_PLAIN = "_llama_surgery_plain"


class InterfaceName(str):
    """An interface name as it lies on the configuration of one model.

    transformers copies configurations, and pickles them. A copy belongs to another model, which is dense: it
    gets the name of the dense implementation.

    Attributes:
        plain: The name as an ordinary string.
    """

    __slots__ = ("plain",)

    def __new__(cls, name: str) -> "InterfaceName":
        made = super().__new__(cls, name)
        made.plain = str(name)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return _BASES[self]

    def __reduce_ex__(self, protocol: Any) -> tuple[type[str], tuple[str]]:
        return str, (_BASES[self],)


def base_of(config: PretrainedConfig) -> str:
    """Implementation of the dense model, whether its attention is replaced at present or not.

    Raises:
        UnsupportedModelError: It is none whose calls can be replaced.
    """
    name = str(config._attn_implementation)
    base = _BASES.get(name, name)
    if base not in INTERFACE_NAMES:
        raise UnsupportedModelError(
            f"attention implementation {base!r}: supported are {', '.join(INTERFACE_NAMES)}. "
            "Load the model with one of them."
        )
    return base


def surgery_mask(base: str, **arguments: Any) -> Any:
    """Mask function: the 2-D padding mask, or None, where attention is plainly causal.

    Any other pattern (sliding windows, packed rows, bidirectional image tokens) is made by the dense
    implementation's own mask function; operated layers refuse it, dense layers use it. So is every mask of a
    model that merely shares its configuration with the one whose attention is replaced.
    """
    call = current_call()
    plain = arguments.get("mask_function", causal_mask_function) is causal_mask_function
    if call is None or arguments.get("config", call.text) is not call.text:
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments)
    if not plain:
        return _overlaid(base, arguments)
    call.remember(arguments)
    return _padding(arguments)


def _overlaid(base: str, arguments: dict[str, Any]) -> Any:
    """A mask that other patterns are laid over, which says so where they come to nothing: no image, say."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[base]
    made = make(**arguments)
    full = isinstance(made, torch.Tensor) and made.dim() == 4 and arguments.get("local_size") is None
    if full and not (made.is_cuda and torch.cuda.is_current_stream_capturing()):
        causal = {**arguments, "mask_function": causal_mask_function, "allow_is_causal_skip": False}
        if torch.equal(made, make(**causal)):
            setattr(made, _PLAIN, (_padding(arguments),))
    return made


def _padding(arguments: dict[str, Any]) -> torch.Tensor | None:
    """The 2-D padding mask of plainly causal attention, or None."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    kv_length = arguments["kv_length"]
    if mask.shape[-1] < kv_length:
        _refuse_short(mask, arguments)
    return mask[:, :kv_length].bool()


def _refuse_short(mask: torch.Tensor, arguments: dict[str, Any]) -> None:
    columns, keys, new = mask.shape[-1], arguments["kv_length"], arguments["q_length"]
    cached = int(arguments["q_offset"])
    if keys > cached + new:  # room for keys that are not there yet
        raise UnsupportedModelError(f"a mask of {columns} columns for {keys} keys: {FIXED_SIZE}")
    raise SurgeryError(
        f"an attention mask of {columns} columns, but {cached} tokens are cached and {new} are new: it needs "
        f"a column for each of the {keys}, the cached ones first."
    )


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
    layer: LayerSurgery | Callable[..., Any] | None = module.__dict__.get(ATTRIBUTE)
    if isinstance(layer, LayerSurgery):
        (attention_mask,) = getattr(attention_mask, _PLAIN, (attention_mask,))
        own = functools.partial(_own_attention, base)
        return run_layer(module, layer, query, key, value, attention_mask, keywords, own), None
    attend = functools.partial(dense_attention, base) if layer is None else layer
    return attend(module, query, key, value, attention_mask, **keywords)


for _base, _name in INTERFACE_NAMES.items():
    AttentionInterface.register(_name, functools.partial(surgery_attention, _base))
    AttentionMaskInterface.register(_name, functools.partial(surgery_mask, _base))


def dense_attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    """What the dense implementation ``base`` returns, given a mask of :func:`surgery_mask`."""
    call = current_call()
    short = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)
    if call is not None and short and getattr(module, "is_causal", True) and not crosses(module):
        found, mask = call.dense_mask(ALL_MASK_ATTENTION_FUNCTIONS[base], query.shape[2], key.shape[2])
        attention_mask = mask if found else attention_mask
    return _run_dense(base, module, query, key, value, attention_mask, keywords)


def _own_attention(base: str, rows: int, keys: int) -> Own | None:
    """The dense model's attention of the last ``rows`` of ``keys`` tokens without padding.

    Returns:
        A function of a module, keywords, query (batch, heads, rows, head_dim), key and value (batch,
        kv_heads, keys, dim), which returns (batch, rows, heads, value_dim); None if none can be relied on.
    """
    call = running_call()
    if call is None or base == "eager":  # that one holds all weights in memory at once
        return None
    found, mask = call.mask_of_part(ALL_MASK_ATTENTION_FUNCTIONS[base], rows, keys)
    if not found:
        return None
    run, planned = functools.partial(_run_dense, base), base != "sdpa" or rows * keys > PLANNED

    def attend(module: torch.nn.Module, keywords: dict[str, Any], *states: torch.Tensor) -> torch.Tensor:
        if planned or not states[0].is_cuda:
            return run(module, *states, mask, keywords)[0]
        with without_cudnn:
            return run(module, *states, mask, keywords)[0]

    return attend


def _run_dense(
    base: str, module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, keywords: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    if base == "eager":  # lives in the modeling file
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[base]
    seen: Any = _Dense(module, base) if base.startswith("flash") else module
    if isinstance(mask, torch.Tensor) and mask.device != query.device:
        mask = mask.to(query.device)  # made once for all layers, which may lie on several devices
    return function(seen, query, key, value, mask, **keywords)


class _Dense:
    """An attention module as on the dense model: flash attention's release is chosen by the configuration."""

    def __init__(self, module: torch.nn.Module, base: str) -> None:
        self._module, self.config = module, copy.copy(module.config)
        self.config._attn_implementation_internal = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
