"""What has other names in other supported versions of transformers."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin

#: Names under which a call may be given its cache.
CACHE_NAMES = ("cache", "past_key_values")
#: Keyword and output field of the cache. A model's own code may keep the older of the two names.
CACHE_NAME = next(
    name
    for name in CACHE_NAMES
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def cache_name(model: nn.Module) -> str:
    """Keyword of the cache in a model's ``forward``."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAME)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call, under either name, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(kwargs: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """The keywords of a call with this cache, under this name alone."""
    return {key: value for key, value in kwargs.items() if key not in CACHE_NAMES} | {name: cache}
