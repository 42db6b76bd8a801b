"""Operating on a model, and taking the topology out again."""

import contextlib
import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.surgery.compat import CACHE_NAME, cache_name, given_cache, with_cache
from llama_surgery.surgery.interface import (
    ATTRIBUTE,
    INTERFACE_NAMES,
    LayerSurgery,
    cache_hook,
    register,
    unregister,
)
from llama_surgery.surgery.statistics import Statistics, summarise
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.router import PageRouter

Model = TypeVar("Model", bound=torch.nn.Module)

#: How many operated models use each registered interface; the last ejection unregisters it.
_users: Counter[str] = Counter()


@dataclasses.dataclass
class Operation:
    """What has to be undone, and where the operated layers are."""

    config: SurgeryConfig
    base: str
    modules: dict[int, torch.nn.Module]
    handles: list[torch.utils.hooks.RemovableHandle]

    @property
    def layers(self) -> dict[int, LayerSurgery]:
        return {index: getattr(module, ATTRIBUTE) for index, module in self.modules.items()}


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
    hook = inner.register_forward_pre_hook(_model_hook, with_kwargs=True)
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
        inner.__dict__["_prepare_cache_for_generation"] = functools.partial(_prepare, inner, prepare)


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
    operation = _operation(model)
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


def is_operated(model: torch.nn.Module) -> bool:
    return ATTRIBUTE in inner_model(model).__dict__


def config_of(model: torch.nn.Module) -> SurgeryConfig:
    """The configuration an operated model runs with."""
    return _operation(model).config


def set_config(model: torch.nn.Module, config: SurgeryConfig) -> None:
    """Change the configuration of an operated model. Caches made before do not fit it."""
    operation = _operation(model)
    operation.config = config
    for layer in operation.layers.values():
        layer.config = config


def surgery_of(model: torch.nn.Module) -> dict[int, LayerSurgery]:
    """What the operated layers carry, by layer index."""
    return _operation(model).layers


def statistics(model: torch.nn.Module) -> Statistics:
    """What the operated layers read since :func:`operate` or :func:`reset_statistics`."""
    operation = _operation(model)
    counters = {index: layer.counters for index, layer in operation.layers.items()}
    return summarise(counters, operation.config.page_size)


def reset_statistics(model: torch.nn.Module) -> None:
    for layer in _operation(model).layers.values():
        layer.counters.clear()


def paged_cache(model: torch.nn.Module) -> PagedCache:
    """An empty cache for an operated model, as ``generate()`` and ``forward()`` build by themselves."""
    operation = _operation(model)
    text = inner_model(model).config.get_text_config(decoder=True)
    return PagedCache(text, operation.config, list(operation.modules))


def routers_of(model: torch.nn.Module) -> dict[int, PageRouter]:
    """Learned corrections of an operated model, by layer index."""
    return {index: layer.router for index, layer in surgery_of(model).items() if layer.router is not None}


def _operation(model: torch.nn.Module) -> Operation:
    operation = inner_model(model).__dict__.get(ATTRIBUTE)
    if operation is None:
        raise SurgeryError("the model is not operated: call operate(model) first.")
    return operation


def _model_hook(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-forward hook of the model: refuses what cannot work and provides the paged cache."""
    # A copy of an operated model may outlive the original, or wake up in another process.
    register(_operation(model).base)
    if len(args) > 1:
        names = inspect.signature(model.forward).parameters
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            "output_attentions: operated layers never form attention weights. eject(model) first."
        )
    position_ids = kwargs.get("position_ids")
    counted = kwargs.get("attention_mask") is None and position_ids is not None and position_ids.dim() == 2
    given = given_cache(kwargs)
    counted = counted and not (isinstance(given, PagedCache) and given.recording)  # no questions in a graph
    if counted and bool((position_ids.diff(dim=-1) < 1).any()):
        # Without a cache transformers would make a mask of them; with one, it mixes the sequences in silence.
        raise UnsupportedModelError(
            "packed rows: position_ids start anew within a row. Operated layers take one sequence a row: "
            "unpack them and pad, with an attention_mask."
        )
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config.get_text_config(), "use_cache", False)
    recomputed = model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    if use_cache and given_cache(kwargs) is None and not recomputed:
        kwargs = with_cache(kwargs, cache_name(model), paged_cache(model))
    return args, kwargs


def _prepare(
    model: PreTrainedModel,
    prepare: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands in for transformers' own cache preparation in ``generate()``."""
    wanted = generation_config.cache_implementation
    if wanted not in (None, "dynamic", "hybrid"):
        raise UnsupportedModelError(
            f"cache_implementation={wanted!r}: an operated model needs its paged cache. Leave it unset."
        )
    if given_cache(model_kwargs) is None and generation_config.use_cache is not False:
        model_kwargs[CACHE_NAME] = paged_cache(model)
    prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = given_cache(model_kwargs)
    if isinstance(cache, PagedCache):
        # Assisted generation verifies several tokens in one call: decode steps too.
        assisted = str(getattr(generation_mode, "value", generation_mode)) == "assisted_generation"
        cache.decode_rows = cache.surgery.chunk_size if assisted else 1
        cache.settle_last_tile = True
        cache.expect_length(max_cache_length)
