"""What holds while ``generate()`` of an operated model runs, and not a moment longer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from llama_surgery.surgery.cache import Generation, PagedCache


@dataclasses.dataclass(eq=False)
class Running:
    """A running ``generate()``.

    Attributes:
        owner: The operation whose model generates.
        columns: Columns of the prompt, padding and what is cached included; None where no input tells.
        generation: What caches refer to.
        ends: Tokens of each sequence's prompt, or one number for all; empty before they are known.
        maximum: Columns there will ever be.
    """

    owner: object
    columns: int | None
    generation: Generation = dataclasses.field(default_factory=Generation)
    ends: Sequence[int] = ()
    maximum: int | None = None

    def prepare(self, mask: Any, maximum: int) -> None:
        """Learn what transformers made of the inputs: the prompt's mask, if one is needed, and the length."""
        self.maximum = maximum
        if _padded(mask):
            self.columns = mask.shape[1]
        if self.columns is not None:
            self.ends = _ends(mask, self.columns)

    def adopt_another(self, cache: PagedCache, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Have a cache follow that a call of the model begins with.

        It takes the place of that of ``generate()``, which the model's own code has dropped; but where it is
        to hold less than the prompt, it is another text, such as the negative prompt of classifier-free
        guidance, and has an end of its own.
        """
        columns = _columns(args, kwargs)
        if columns is None or self.columns is None or columns >= self.columns:
            self.adopt(cache)
        else:
            cache.follow(self.generation, _ends(kwargs.get("attention_mask"), columns))

    def adopt(self, cache: PagedCache) -> None:
        """Have the cache follow that the call began with."""
        if self.maximum is not None:
            cache.expect_length(self.maximum)
        if not self.ends or self.columns is None:
            return
        # A single token behind those cached goes on with an earlier call: it is a decode step as there.
        one_more = self.columns - cache.get_seq_length() == 1
        cache.follow(self.generation, [0] if one_more else self.ends)


_running: ContextVar[Running | None] = ContextVar("llama_surgery_generation", default=None)


def generate(owner: object, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for a model's own ``generate()``, which is ``plain``."""
    running = Running(owner, _columns(args, kwargs))
    token = _running.set(running)
    try:
        return plain(*args, **kwargs)
    finally:
        _running.reset(token)
        running.generation.over = True


def running_of(owner: object) -> Running | None:
    """The innermost ``generate()`` that runs in this thread, if it is one of ``owner``."""
    running = _running.get()
    return running if running is not None and running.owner is owner else None


def _padded(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _ends(mask: Any, columns: int) -> list[int]:
    """Tokens of each sequence of a prompt, or one number for all."""
    return mask.bool().sum(1).tolist() if _padded(mask) else [columns]


def _columns(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Columns of a prompt, as transformers counts those of its mask."""
    inputs = args[0] if args else kwargs.get("inputs")
    for given in (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if isinstance(given, torch.Tensor) and given.dim() >= 2:
            return given.shape[1]
    return 1 if inputs is None else None  # transformers begins with a token of its own
