"""The paged cache: a transformers cache whose operated layers keep full chunks in tree order."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.calls import current_call
from llama_surgery.surgery.paged_layer import PagedLayer

__all__ = ["Generation", "PagedCache", "PagedLayer"]


class Generation:
    """One call of ``generate()``, which caches and copies of them refer to: once over, it is over for all."""

    over = False

    def __deepcopy__(self, memo: dict[int, object]) -> "Generation":
        return self


class PagedCache(DynamicCache):
    """Cache of an operated model: operated layers paged, all others as transformers keeps them.

    ``generate()`` of an operated model builds one by itself.

    Args:
        config: The model's configuration.
        surgery: The operation's configuration.
        layers: Indices of the operated layers.
    """

    def __init__(self, config: PretrainedConfig, surgery: SurgeryConfig, layers: list[int]) -> None:
        super().__init__(config=config)
        self.surgery = surgery
        self._generation: Generation | None = None
        self._ends: list[int] = []
        self._begun: list[int] | None = None  # what layers held when the call began that has not ended
        for index in layers:
            self.layers[index] = PagedLayer(surgery)

    @property
    def paged(self) -> list[PagedLayer]:
        """The layers of operated attention."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def recording(self) -> bool:
        """Is a step being captured?"""
        return any(layer.recording for layer in self.paged)

    @property
    def prompt_ends(self) -> list[int] | None:
        """While ``generate()`` runs, tokens of each sequence's prompt, or one number for all; else None."""
        return None if self._generation is None or self._generation.over else self._ends

    def follow(self, generation: Generation, ends: Sequence[int]) -> None:
        """Have rows behind a prompt, or in its last tile, be decode steps in every call until it is over.

        Args:
            generation: Says when it is over.
            ends: Tokens of each sequence's prompt, all that is cached included, or one number for all.
        """
        self._generation = generation
        self._ends = list(ends)[:1] if len(set(ends)) == 1 else list(ends)

    @contextlib.contextmanager
    def prompt(self, *ends: int) -> Iterator[None]:
        """For the length of a ``with`` block, compute rows as ``generate()`` does, for a loop of one's own.

        Args:
            ends: As in :meth:`follow`.
        """
        generation = Generation()
        self.follow(generation, ends)
        try:
            yield
        finally:
            generation.over = True

    def begin(self) -> None:
        """A call of the model begins.

        Raises:
            SurgeryError: The last one ended halfway, with an exception, or ran only some of the layers.
        """
        paged = self.paged
        held = [layer.slots if isinstance(layer, PagedLayer) else _length(layer) for layer in self.layers]
        if self._begun not in (None, held) or len({layer.slots for layer in paged}) > 1:
            before = "" if self._begun is None else f", {_several(self._begun)} before it"
            raise SurgeryError(
                f"the last call on this cache did not end: its layers hold {_several(held)} tokens{before}. "
                "What it was to add is there in part. Start with a new cache."
            )
        self._begun = held

    def end(self) -> None:
        """The call ended as it should."""
        self._begun = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand new states through: the attention function, which knows the padding, stores them.

        Raises:
            UnsupportedModelError: The attention that called is not operated.
        """
        layer, call = self.layers[layer_idx], current_call()
        if not isinstance(layer, PagedLayer) or call is None or call.cache is not self:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        call.handed = layer
        return key_states, value_states

    def expect_length(self, tokens: int) -> None:
        """Say that no sequence will exceed ``tokens`` tokens: memory is then kept for those, and not more."""
        for layer in self.paged:
            layer.maximum = tokens

    def reset(self) -> None:
        super().reset()
        self.end()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self._ends)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def _select(self, indices: torch.Tensor) -> None:
        if self.prompt_ends is not None and len(self._ends) > 1:
            self._ends = [self._ends[index] for index in indices.tolist()]


def _length(layer: object) -> int:
    """Tokens a layer of transformers holds; those of some kinds do not count."""
    count = getattr(layer, "get_seq_length", None)
    return 0 if count is None else int(count())


def _several(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
