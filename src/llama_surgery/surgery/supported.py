"""Which models can be operated: their attention modules, and why others are refused."""

import functools
import inspect
import typing
from collections import Counter
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.surgery.compat import CACHE_NAMES
from llama_surgery.surgery.source import attention_source

FULL, SLIDING = "full_attention", "sliding_attention"

#: Keywords by which attention modules are given the states of something else than their own tokens.
_FOREIGN = {"encoder_hidden_states", "key_value_states", "cross_attention_states"}

#: Keywords of attention functions that no operated layer can honour, and what they are for.
_REFUSED_KEYWORDS = {
    "cu_seq_lens_q": "packed rows",
    "cu_seq_lens_k": "packed rows",
    "position_bias": "additive position biases",
}

#: What layers of a type are, by the beginning of its name; types that are not here choose their own keys.
_KINDS = {
    "hybrid": "attention and a state-space mixer or convolution in one layer, with one cache for both",
    "sliding": "a sliding window",
    "chunked": "chunks that do not see each other",
    "linear": "linear or state-space",
    "conv": "a convolution",
}


def inner_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model, taken out of a PEFT or compile wrapper.

    Raises:
        UnsupportedModelError: There is none.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    return model


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """Modules of the decoder's causal self-attention over everything before, by layer index.

    Other attention stays dense: sliding windows, cross-attention in layers of its own.

    Raises:
        UnsupportedModelError: There is none, or the architecture cannot be operated.
    """
    name, text = type(model).__name__, _text_config(model)
    _check_model(model, text)
    types = getattr(text, "layer_types", None)
    found: dict[int, torch.nn.Module] = {}
    kinds: Counter[str] = Counter()
    crossing: dict[int, str] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if getattr(module, "config", None) is not text or not _dispatches(module):
            continue
        if not isinstance(index, int) or index < 0:
            continue  # it has no place in a cache: a layer's index is given with each call, or none at all
        if crosses(module):
            crossing[index] = path
            continue
        if types and index >= len(types):
            continue  # not one of the decoder's layers: a head that predicts several tokens, say
        # Without layer types a configured window holds for all layers, as transformers' caches have it.
        windows = getattr(text, "sliding_window", None)
        kind = types[index] if types else SLIDING if windows else FULL
        if kind != FULL:
            kinds[kind] += 1
            continue
        _check_module(name, module)
        if index in found:
            raise UnsupportedModelError(
                f"{name} has several attention modules for layer {index}: not supported."
            )
        found[index] = module
    # Where nothing is marked as causal, self-attention and cross-attention of a layer look the same.
    beside = sorted(crossing.keys() & (found or crossing).keys()) if found or not kinds else []
    if beside:
        raise UnsupportedModelError(
            f"{name} has cross-attention beside the self-attention of its layers ({crossing[beside[0]]}): "
            "decoders of an encoder's states are not supported."
        )
    if not found:
        raise UnsupportedModelError(_reason(model, text, kinds))
    same = next((kind for kind in kinds if not kind.startswith(tuple(_KINDS))), None)
    if same is not None:
        raise UnsupportedModelError(
            f"{name} has layers of {same} ({_why(same)}) beside those of full attention, and they make their "
            "mask of the one that those are given: not supported."
        )
    return found


def _text_config(model: PreTrainedModel) -> PretrainedConfig:
    try:
        return model.config.get_text_config()
    except ValueError as error:  # several, and transformers does not choose
        if getattr(model.config, "is_encoder_decoder", False):
            return model.config
        raise UnsupportedModelError(
            f"{type(model).__name__} holds several language models: operate on the one that is meant."
        ) from error


def _check_model(model: PreTrainedModel, text: PretrainedConfig) -> None:
    """What rules out an architecture as a whole."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder: only decoders are supported.")
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name} uses ALiBi, whose position bias depends on the order of keys: not supported."
        )
    if not getattr(text, "is_causal", True):
        raise UnsupportedModelError(f"{name} has bidirectional attention (is_causal=False): not supported.")
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise UnsupportedModelError(f"{name} shares keys between layers: not supported.")
    for part in model.modules():
        own = _own_cache(type(part)) if isinstance(part, PreTrainedModel) else None
        if own is not None:
            raise UnsupportedModelError(
                f"{name} takes no cache but one of its own ({own.__name__}), which keeps no pages: "
                "not supported."
            )


@functools.cache
def _own_cache(kind: type[PreTrainedModel]) -> type[Cache] | None:
    """The class of cache that a model's forward pass insists on, if a paged one is none."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(kind.forward))
    except Exception:  # of an annotation that cannot be evaluated, which says nothing
        return None
    allowed = [
        option
        for keyword in CACHE_NAMES
        for option in (hints.get(keyword), *typing.get_args(hints.get(keyword)))
        if isinstance(option, type) and issubclass(option, Cache)
    ]
    return allowed[0] if allowed and not issubclass(PagedCache, tuple(allowed)) else None


def _dispatches(module: torch.nn.Module) -> bool:
    """Is it an attention module that calls the attention function of its model's implementation?"""
    source = attention_source(type(module))
    if source is None:
        return type(module).__name__.endswith("Attention")
    return source.calls > 0


def crosses(module: torch.nn.Module) -> bool:
    """Does an attention module take keys and values of other states than those that ask?"""
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return True
    foreign = _FOREIGN & inspect.signature(type(module).forward).parameters.keys()
    return bool(foreign) and not getattr(module, "is_causal", True)


def _check_module(name: str, module: torch.nn.Module) -> None:
    """What rules out an attention module."""
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{name} has bidirectional attention: not supported.")
    source, kind = attention_source(type(module)), type(module).__name__
    if source is None:
        return
    if source.calls > 1:
        raise UnsupportedModelError(
            f"{name} calls its attention function twice for one update of the cache ({kind}): not supported."
        )
    if source.own_mask:
        raise UnsupportedModelError(
            f"{name} makes its attention mask itself, in every layer ({kind}), which pages cannot honour: "
            "not supported."
        )
    if source.own_index:
        raise UnsupportedModelError(
            f"{name} runs its layers several times for a token, each time with keys of its own ({kind}): "
            "not supported."
        )


def _why(kind: str) -> str:
    own = "sparse by a rule of their own"
    return next((why for start, why in _KINDS.items() if kind.startswith(start)), own)


def _reason(model: PreTrainedModel, text: PretrainedConfig, kinds: Counter[str]) -> str:
    """Why there is nothing to operate on."""
    name = type(model).__name__
    nothing = f"{name} has no full-attention layer to operate on"
    if kinds:
        return f"{nothing}: " + "; ".join(f"{n} × {kind} ({_why(kind)})" for kind, n in kinds.items()) + "."
    attention = {path: m for path, m in model.named_modules() if "Attention" in type(m).__name__}
    if not attention:
        return f"{nothing}: it has no attention at all (a state-space model)."
    for path, module in attention.items():
        if not hasattr(module, "layer_idx") or not _dispatches(module):
            continue
        place = isinstance(module.layer_idx, int) and module.layer_idx >= 0
        if module.config is text and not place:
            return f"{nothing}: layers share one attention module ({path}), each with a cache of its own."
        if module.config is not text and place:
            config = type(module.config).__name__
            return f"{nothing}: its attention belongs to parts configured apart ({path}: {config})."
    return (
        f"{name} does not use transformers' attention interface, so that its attention cannot be replaced. "
        "Supported are decoders whose modeling file dispatches through it (Llama, Mistral, Qwen, Gemma, "
        "Phi-3, gpt-oss and most recent ones)."
    )


def head_shape(model: PreTrainedModel, module: torch.nn.Module) -> tuple[int, int, int]:
    """KV heads, query heads of a KV head's group and head_dim of an attention module of ``model``."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    # What attention functions of transformers go by. Configurations count heads before a module repeats them,
    # or hold a number that their model never looks at.
    group = getattr(module, "num_key_value_groups", 1)
    dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", text.hidden_size // heads)
    return heads // group, group, dim


def refuse(module: torch.nn.Module, mask: Any, keywords: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for what no topology can honour."""
    name = type(module).__name__
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise UnsupportedModelError(
            f"{name} was given a mask that is not plainly causal (packed rows, bidirectional image tokens "
            "or a mask of your own): operated layers support causal attention with padding only. Pass a "
            "2-D attention_mask, one sequence a row."
        )
    if keywords.get("is_causal") is False:
        raise UnsupportedModelError(
            f"{name} was asked for bidirectional attention (is_causal=False). Eject first."
        )
    if keywords.get("output_attentions"):
        raise UnsupportedModelError("output_attentions: attention weights are never formed. Eject first.")
    if keywords.get("dropout"):
        raise UnsupportedModelError("attention dropout: set attention_dropout=0 or call model.eval().")
    for keyword, what in _REFUSED_KEYWORDS.items():
        if keywords.get(keyword) is not None:
            raise UnsupportedModelError(f"{keyword} ({what}) is not supported by operated layers.")
