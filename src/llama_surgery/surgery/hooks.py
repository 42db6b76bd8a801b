"""What an operated model does before transformers' own code: refuses what cannot work, provides the cache."""

import functools
import inspect
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.calls import current_call
from llama_surgery.surgery.compat import CACHE_NAME, cache_name, given_cache, with_cache
from llama_surgery.surgery.generation import generate, running_of
from llama_surgery.surgery.interface import FIXED_SIZE
from llama_surgery.surgery.operation import Operation, room_of
from llama_surgery.surgery.replace import parts_around


def hook(inner: PreTrainedModel, operation: Operation) -> None:
    """Put the hooks on ``inner``, the models inside it and, where a room asks for it, operated modules."""
    handles, room = operation.replacement.handles, room_of(operation.config)
    if room is not None:
        for module in operation.modules.values():
            handles.append(module.register_forward_pre_hook(room.hook, with_kwargs=True))
    for part in parts_around(inner, operation.modules.values()):
        before = functools.partial(model_hook, operation)
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        # Before the hook by which the call ends.
        handles.append(part.register_forward_hook(done_hook, prepend=True, with_kwargs=True))
        if part.can_generate():
            prepare = part._prepare_cache_for_generation
            if room is None:
                operation.put(part, "generate", functools.partial(generate, operation, part.generate))
            operation.put(
                part, "_prepare_cache_for_generation", functools.partial(prepare_cache, operation, prepare)
            )
            operation.put(part, "init_continuous_batching", refuse_batching)


def refuse_batching(*args: Any, **kwargs: Any) -> None:
    """Raise UnsupportedModelError."""
    raise UnsupportedModelError(
        "continuous batching (generate_batch) fills a cache of its own, which operated layers cannot read: "
        "call generate(), or eject(model) first."
    )


def model_hook(
    operation: Operation, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-forward hook of the model: refuses what cannot work and provides the paged cache."""
    call = current_call()
    if call is not None and call.model is not model:
        return None  # a part of the model that was called
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
    if isinstance(given, PagedAttentionCache):
        refuse_batching()
    if getattr(given, "is_compileable", False):
        raise UnsupportedModelError(f"{type(given).__name__}: {FIXED_SIZE}")
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
    if use_cache and given is None and not recomputed:
        given = operation.cache()
        if (running := running_of(operation)) is not None:
            running.adopt_another(given, args, kwargs)
        kwargs = with_cache(kwargs, cache_name(model), given)
    if isinstance(given, PagedCache):
        check_fits(operation, given)
        given.begin()
        if call is not None and not recomputed:  # else the model's own code drops the cache
            call.cache = given
    return args, kwargs


def check_fits(operation: Operation, cache: PagedCache) -> None:
    """Raise SurgeryError where the cache was made for other layers, or another configuration."""
    for index, layer in enumerate(cache.layers):
        paged = isinstance(layer, PagedLayer)
        # Most often it is the same object, and compilers cannot compare configurations.
        alike = not paged or layer.config is operation.config or layer.config == operation.config
        if paged != (index in operation.modules) or not alike:
            raise SurgeryError(
                "the paged cache was made for another model or configuration: start with a new one."
            )


def done_hook(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the model: a call that failed does not come here."""
    call, cache = current_call(), given_cache(kwargs)
    if call is not None and call.model is model and isinstance(cache, PagedCache):
        cache.end()


def prepare_cache(
    operation: Operation,
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
        model_kwargs[CACHE_NAME] = operation.cache()
        generation_config.cache_implementation = None  # beside a cache transformers takes no name of one
    prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache, running = given_cache(model_kwargs), running_of(operation)
    if running is not None:
        running.prepare(model_kwargs.get("attention_mask"), max_cache_length)
        if isinstance(cache, PagedCache):
            running.adopt(cache)
