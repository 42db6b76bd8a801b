"""Replacing the attention of a model, and putting its own back."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.calls import current_call, enter, leave, untraced
from llama_surgery.surgery.interface import INTERFACE_NAMES, InterfaceName, base_of
from llama_surgery.surgery.layer import ATTRIBUTE


class Replacement:
    """The state of a model whose attention is replaced: the one owner of its implementation.

    transformers asks the configuration, which models may share and which is copied with the model, what
    implementation to call. So a model is told apart from others by its calls, and a copy of it writes the
    name on the copied configuration again.

    Attributes:
        text: The configuration that the replaced modules ask.
        base: Implementation of the dense model.
        handles: Hooks to remove.
    """

    def __init__(self, text: PretrainedConfig, base: str) -> None:
        self.text, self.base = text, base
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self._write()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._write()

    def _write(self) -> None:
        _live.add(self)
        self.text._attn_implementation_internal = InterfaceName(INTERFACE_NAMES[self.base])

    def enter(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of a model that holds replaced modules.

        Raises:
            SurgeryError: They are about to call another implementation than the one they were given.
        """
        name, own = self.text._attn_implementation, INTERFACE_NAMES[self.base]
        name = getattr(name, "plain", name)  # torch.compile of PyTorch 2.11 compares no subclasses of str
        if name != own:
            raise SurgeryError(
                f"the attention implementation was changed to {name!r} while the model is operated: "
                "eject(model) first, set it, and operate again."
            )

        enter(model, self, self.text)
        _rename(self.text, own, str)

    def leave(self, model: torch.nn.Module, args: tuple, result: Any) -> None:
        """Forward hook of it, also where the call failed."""
        leave(model=model)
        if current_call() is None:
            _rename(self.text, INTERFACE_NAMES[self.base], InterfaceName)

    def undo(self) -> None:
        """Remove the hooks and give the configuration its implementation back."""
        for handle in self.handles:
            handle.remove()
        leave(owner=self)  # a call that was interrupted
        _live.discard(self)
        if not any(other.text is self.text for other in _live):
            self.text._attn_implementation_internal = self.base


@untraced
def _rename(text: PretrainedConfig, name: str, kind: type[str]) -> None:
    """Write ``name``, if it is the one on the configuration, as a string of another kind.

    While a call runs it is plain: torch.compile takes it for a constant, and of a string class of our own
    torch 2.11 cannot do so.
    """
    if text._attn_implementation_internal == name:
        text._attn_implementation_internal = kind(name)


#: Those that are in force: several models may share a configuration.
_live: weakref.WeakSet[Replacement] = weakref.WeakSet()


def parts_around(inner: PreTrainedModel, modules: Iterable[torch.nn.Module]) -> list[PreTrainedModel]:
    """``inner`` and the models inside it that hold some of ``modules``, the outermost first."""
    wanted = {id(module) for module in modules}
    parts = [part for part in inner.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if any(id(module) in wanted for module in part.modules())]


def check_replaceable(inner: PreTrainedModel, modules: Iterable[torch.nn.Module]) -> str:
    """Implementation of the dense model, whose calls can be replaced.

    Raises:
        UnsupportedModelError: They cannot.
        SurgeryError: They are replaced already.
    """
    text, modules = inner.config.get_text_config(), list(modules)
    base = base_of(text)
    if any(ATTRIBUTE in module.__dict__ for module in modules):
        raise SurgeryError("the model is part of one that is operated already: eject that first.")
    parts = parts_around(inner, modules)
    if not _has_forward(inner):
        names = {id(part): name for name, part in inner.named_modules()}
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no forward, it hands its inputs to its parts. Operate on the part: "
            f"operate(model.{names[id(next(part for part in parts if _has_forward(part)))]})."
        )
    for part in parts:
        if part.config is text and not part._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"{type(part).__name__} does not use transformers' attention interface, so that its "
                "attention cannot be replaced. Supported are decoders whose modeling file dispatches through "
                "it (Llama, Mistral, Qwen, Gemma, Phi-3, gpt-oss and most recent ones)."
            )
    return base


def _has_forward(model: torch.nn.Module) -> bool:
    return type(model).forward is not torch.nn.Module.forward


def replace(inner: PreTrainedModel, base: str, modules: Iterable[torch.nn.Module]) -> Replacement:
    """Have ``modules`` attend through what they carry as ``ATTRIBUTE``, all others through ``base``."""
    replacement = Replacement(inner.config.get_text_config(), base)
    for part in parts_around(inner, modules):
        replacement.handles += [
            part.register_forward_pre_hook(replacement.enter, with_kwargs=True),
            part.register_forward_hook(replacement.leave, always_call=True),
        ]
    return replacement


@contextlib.contextmanager
def attention_replaced(
    inner: PreTrainedModel, modules: Iterable[torch.nn.Module], attention: Callable[..., Any]
) -> Iterator[None]:
    """Run ``modules`` of a dense model through another attention function; always goes back.

    Args:
        inner: A model of transformers.
        modules: Attention modules of it.
        attention: Takes an implementation and what transformers passes to attention functions: the one of the
            dense model, the module, queries, keys, values, the mask of :func:`surgery_mask` and keywords.

    Raises:
        UnsupportedModelError: The model's attention implementation is none that can be replaced.
        SurgeryError: The attention is replaced already.
    """
    modules = list(modules)
    base = check_replaceable(inner, modules)
    replacement = replace(inner, base, modules)
    try:
        for module in modules:
            module.__dict__[ATTRIBUTE] = functools.partial(attention, base)
        yield
    finally:
        for module in modules:
            module.__dict__.pop(ATTRIBUTE, None)
        replacement.undo()
