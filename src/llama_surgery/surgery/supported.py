"""Which models can be operated: their attention modules, and why others are refused."""

import torch
from transformers import PreTrainedModel

from llama_surgery.errors import UnsupportedModelError


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
    """Full-attention modules of the decoder by layer index.

    Raises:
        UnsupportedModelError: There is none, or the architecture cannot be operated.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder: only decoders are supported.")
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name} uses ALiBi, whose position bias depends on the order of keys: not supported."
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares keys between layers: not supported.")
    types = getattr(text, "layer_types", None)
    found, seen, sliding = {}, set(), 0
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        is_attention = type(module).__name__.endswith("Attention") and isinstance(index, int)
        if not is_attention or getattr(module, "config", None) is not text:
            continue
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{name} has bidirectional attention: not supported.")
        if index in seen:
            raise UnsupportedModelError(
                f"{name} has several attention modules for layer {index}: not supported."
            )
        seen.add(index)
        # Without layer types a configured window holds for all layers, as transformers' caches have it.
        if types[index] != "full_attention" if types else getattr(text, "sliding_window", None):
            sliding += 1
            continue
        found[index] = module
    if not found:
        reason = (
            f"all its {sliding} attention layers are sliding-window or linear ones"
            if sliding
            else "it has no attention modules this package knows (state-space or other mixers)"
        )
        raise UnsupportedModelError(f"{name} has no full-attention layer to operate on: {reason}.")
    return found


def head_shape(model: PreTrainedModel, module: torch.nn.Module) -> tuple[int, int, int]:
    """KV heads, query heads of a KV head's group and head_dim of an attention module of ``model``."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return kv_heads, heads // kv_heads, getattr(module, "head_dim", text.hidden_size // heads)
