"""Operating on a model, and taking the topology out again."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.hooks import cache_hook, model_hook, prepare_cache
from llama_surgery.surgery.interface import INTERFACE_NAMES, register, unregister
from llama_surgery.surgery.layer import ATTRIBUTE, LayerSurgery
from llama_surgery.surgery.operation import (
    Operation,
    config_of,
    is_operated,
    operation_of,
    paged_cache,
    reset_statistics,
    routers_of,
    set_config,
    statistics,
    surgery_of,
)
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.router import PageRouter

__all__ = [
    "config_of",
    "eject",
    "is_operated",
    "operate",
    "operated",
    "paged_cache",
    "reset_statistics",
    "routers_of",
    "set_config",
    "set_implementation",
    "statistics",
    "surgery_of",
]

Model = TypeVar("Model", bound=torch.nn.Module)

#: How many operated models use each registered interface; the last ejection unregisters it.
_users: Counter[str] = Counter()


def operate(
    model: Model,
    config: SurgeryConfig | None = None,
    *,
    routers: Mapping[int, PageRouter] | None = None,
    density: float | None = None,
    text: list[str] | None = None,
    tokenizer: Any = None,
    length: int | None = None,
) -> Model:
    """Give every full-attention layer of ``model`` the configured topology. No weight changes.

    The same object comes back, operated; ``forward`` and ``generate`` work as before. With ``density``
    and ``text`` the thresholds are calibrated so that the executed far density does not exceed
    ``density`` on that text, for tiles and for decode steps.

    Args:
        model: A Hugging Face decoder, possibly wrapped by PEFT.
        config: The topology; the documented defaults if None.
        routers: Learned corrections by layer index, or None.
        density: Largest executed far density, over causal pairs, at ``length``.
        text: Documents to calibrate on; needs ``density`` and ``tokenizer``.
        tokenizer: The model's tokenizer.
        length: Tokens of a calibration window; the model's context, at most 8,192, if None.

    Raises:
        UnsupportedModelError: The model cannot be operated, with the reason.
        SurgeryError: It is operated already, or the arguments do not fit together.
        TextError: The text is too short.
    """
    config = SurgeryConfig() if config is None else config
    inner = inner_model(model)
    if is_operated(model):
        raise SurgeryError("the model is operated already: eject(model) first.")
    if (density is None) != (text is None):
        raise SurgeryError("density and text go together: thresholds are calibrated on text.")
    modules = attention_modules(inner)
    if any(ATTRIBUTE in module.__dict__ for module in modules.values()):
        raise SurgeryError("the model is part of one that is operated already: eject that first.")
    base = inner.config.get_text_config()._attn_implementation
    if base not in INTERFACE_NAMES:
        raise UnsupportedModelError(
            f"attention implementation {base!r}: supported are {', '.join(INTERFACE_NAMES)}. "
            "Load the model with one of them."
        )
    operation = Operation(config, base, modules, [])
    try:
        _attach(inner, operation, routers or {})
        if text is not None and density is not None:
            from llama_surgery.surgery.calibrate import calibrate

            set_config(model, calibrate(model, tokenizer, text, density, length))
    except BaseException:
        eject(model)
        raise
    return model


def _attach(inner: PreTrainedModel, operation: Operation, routers: Mapping[int, PageRouter]) -> None:
    inner.__dict__[ATTRIBUTE] = operation
    unknown = sorted(routers.keys() - operation.modules.keys())
    if unknown:
        raise SurgeryError(
            f"routers for layers {unknown}, which are not operated: learn them for this model."
        )
    for index, module in operation.modules.items():
        router = routers.get(index)
        if router is not None:
            router.check(*head_shape(inner, module))
            router = router.to(next(module.parameters()).device)
        module.__dict__[ATTRIBUTE] = LayerSurgery(operation.config, router)
        hook = module.register_forward_pre_hook(cache_hook, with_kwargs=True)
        operation.handles.append(hook)
    hook = inner.register_forward_pre_hook(model_hook, with_kwargs=True)
    operation.handles.append(hook)
    _users[operation.base] += 1
    name = register(operation.base)
    set_implementation(inner, name)
    if inner.config.get_text_config()._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(inner).__name__} does not use transformers' attention interface, so that its attention "
            "cannot be replaced. Supported are decoders whose modeling file dispatches through it (Llama, "
            "Mistral, Qwen, Gemma, Phi-3, gpt-oss and most recent ones)."
        )
    if inner.can_generate():
        prepare = inner._prepare_cache_for_generation
        inner.__dict__["_prepare_cache_for_generation"] = functools.partial(prepare_cache, inner, prepare)


def set_implementation(inner: PreTrainedModel, name: str) -> None:
    """Have the text part of a model attend through ``name``."""
    text = inner.config.get_text_config()
    if text is inner.config:
        inner.set_attn_implementation(name)
        return
    key = next(k for k in inner.config.sub_configs if getattr(inner.config, k) is text)
    inner.set_attn_implementation({key: name})


def eject(model: Model) -> Model:
    """Take the topology out. The model is bit-identical to what it was before.

    Raises:
        SurgeryError: The model is not operated.
    """
    inner = inner_model(model)
    operation = operation_of(model)
    for handle in operation.handles:
        handle.remove()
    for module in operation.modules.values():
        module.__dict__.pop(ATTRIBUTE, None)
    inner.__dict__.pop("_prepare_cache_for_generation", None)
    inner.__dict__.pop(ATTRIBUTE, None)
    set_implementation(inner, operation.base)
    # A copy of an operated model was never counted.
    _users[operation.base] = max(0, _users[operation.base] - 1)
    if not _users[operation.base]:
        unregister(operation.base)
    return model


@contextlib.contextmanager
def operated(model: Model, config: SurgeryConfig | None = None, **arguments: Any) -> Iterator[Model]:
    """:func:`operate` for the length of a ``with`` block; always ejects."""
    operate(model, config, **arguments)
    try:
        yield model
    finally:
        if is_operated(model):
            eject(model)
