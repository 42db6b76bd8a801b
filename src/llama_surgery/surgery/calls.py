"""Whose forward is running: transformers asks for a mask without saying which model it is for."""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from llama_surgery.errors import UnsupportedModelError

if TYPE_CHECKING:
    from llama_surgery.surgery.cache import PagedCache
    from llama_surgery.surgery.paged_layer import PagedLayer

_current: ContextVar["Call | None"] = ContextVar("llama_surgery_call", default=None)

#: Puts a function outside of what torch.compile makes one graph of.
untraced: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable(
    reason="operated layers choose pages in every call, so that a model is several graphs: compile without "
    "fullgraph=True, or eject(model) first"
)


@dataclasses.dataclass(eq=False)
class Call:
    """A forward of a model whose attention is replaced.

    Attributes:
        model: The model that was called: it, or a part of it that was called by itself.
        owner: Who replaced its attention.
        text: The configuration that its masks are made by.
        cache: The paged cache that it was given, if any.
        handed: The layer of the cache that has new states, between its update and its attention.
        whole: What all operated layers do, if all rows see everything: as the first of them found.
    """

    model: torch.nn.Module
    owner: object
    text: PretrainedConfig
    cache: "PagedCache | None" = None
    handed: "PagedLayer | None" = None
    whole: Callable[..., torch.Tensor | None] | None = None
    _arguments: dict[str, Any] | None = None
    _dense: Any = None

    def remember(self, arguments: dict[str, Any]) -> None:
        """Keep what a plainly causal mask was asked with: dense attention needs the mask in full."""
        self._arguments, self._dense = arguments, None

    def dense_mask(self, make: Callable[..., Any], rows: int, keys: int) -> tuple[bool, Any]:
        """The last plainly causal mask as the dense implementation has it.

        Args:
            make: The mask function of the dense implementation.
            rows: Queries of the attention that asks.
            keys: Its keys.

        Returns:
            Is there one for as many rows and keys, and the mask.
        """
        asked = self._arguments
        if asked is None or (asked.get("q_length", rows), asked.get("kv_length", keys)) != (rows, keys):
            return False, None
        if self._dense is None:
            self._dense = (make(**asked),)
        return True, self._dense[0]

    def mask_of_part(self, make: Callable[..., Any], rows: int, keys: int) -> tuple[bool, Any]:
        """:meth:`dense_mask` for the last ``rows`` of ``keys`` tokens without padding, a part of the call."""
        found, mask = self.dense_mask(make, rows, keys)
        if found or self._arguments is None:
            return found, mask
        lengths = {"q_length": rows, "kv_length": keys, "q_offset": keys - rows, "attention_mask": None}
        return True, make(**{**self._arguments, **lengths})


def running_call() -> Call | None:
    """:func:`current_call`, for code that is not traced."""
    return _current.get()


@untraced
def current_call() -> Call | None:
    """The call that is running in this thread, of any model whose attention is replaced."""
    return _current.get()


@untraced
def enter(model: torch.nn.Module, owner: object, text: PretrainedConfig) -> None:
    """Begin a call of ``model``, or go on with the call that it is a part of.

    Raises:
        UnsupportedModelError: The call is recorded, to be repeated with other inputs.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise UnsupportedModelError(
            "torch.export, torch.onnx and torch.jit.trace record one call, but operated layers choose other "
            "pages in every one: eject(model) first."
        )
    call = _current.get()
    # A call of the same model is one that was interrupted: no model calls itself.
    if call is None or call.owner is not owner or call.model is model:
        _current.set(Call(model, owner, text))


@untraced
def leave(*, model: torch.nn.Module | None = None, owner: object = None) -> None:
    """End the call, if it is one of ``model`` or ``owner``."""
    call = _current.get()
    if call is not None and (call.model is model or call.owner is owner):
        _current.set(None)
