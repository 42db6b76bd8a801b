"""Another attention function for the length of a ``with`` block, where no topology is put in for good."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.surgery.interface import INTERFACE_NAMES, surgery_mask
from llama_surgery.surgery.operate import set_implementation


def replaceable_implementation(inner: PreTrainedModel) -> str:
    """Name of the attention implementation of a dense model.

    Raises:
        UnsupportedModelError: It is none whose calls can be replaced.
    """
    base = str(inner.config.get_text_config()._attn_implementation)
    if base not in INTERFACE_NAMES:
        raise UnsupportedModelError(
            f"attention implementation {base!r}: supported are {', '.join(INTERFACE_NAMES)}."
        )
    return base


@contextlib.contextmanager
def attention_replaced(
    inner: PreTrainedModel,
    name: str,
    base: str,
    attention: Callable[..., Any],
    mask: Callable[..., Any] = surgery_mask,
) -> Iterator[None]:
    """Run ``inner`` through another attention function; always goes back to ``base``.

    Args:
        inner: A dense model of transformers.
        name: What the function is registered by, for that long.
        base: The model's own implementation.
        attention: Takes what transformers passes to attention functions.
        mask: Takes ``base`` and what transformers passes to mask functions.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, functools.partial(mask, base))
    set_implementation(inner, name)
    try:
        yield
    finally:
        set_implementation(inner, base)
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(name, None)
