"""The cache of a model under the ``gumbel`` topology: keys, values, and the ball of every token."""

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from llama_surgery.errors import SurgeryError


class BallLayer(DynamicLayer):
    """Cache of one operated layer.

    Attributes:
        balls: (batch, heads, n) int64 of all tokens, those of the running call included; None before any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.balls: torch.Tensor | None = None

    def extend(self, fresh: torch.Tensor) -> torch.Tensor:
        """Balls of the tokens held and of ``fresh``, not yet written: (batch, heads, n) int64."""
        held = self.get_seq_length()
        if held:
            assert self.balls is not None
            fresh = torch.cat((self.balls[:, :, :held], fresh), 2)
        self.balls = fresh
        return fresh

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.balls is not None:
            self._select(torch.arange(len(self.balls)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, sequences: torch.Tensor) -> None:
        if self.balls is not None:
            self.balls = self.balls[sequences.to(self.balls.device)]


class BallCache(DynamicCache):
    """Cache of a model whose operated layers are ``layers``. ``generate()`` builds one by itself."""

    def __init__(self, config: PretrainedConfig, layers: list[int]) -> None:
        super().__init__(config=config)
        for index in layers:
            self.layers[index] = BallLayer()


def balls_with(layer: object, fresh: torch.Tensor) -> torch.Tensor:
    """Balls of all tokens of a call: those that its cache's layer holds, if any, and the new ones, int64.

    Raises:
        SurgeryError: The cache holds tokens whose balls are not known.
    """
    if isinstance(layer, BallLayer):
        return layer.extend(fresh)
    held = 0 if layer is None else int(layer.get_seq_length())  # type: ignore[attr-defined]
    if held:
        raise SurgeryError(
            f"the cache holds {held} tokens that content routers have not seen: leave the cache unset, or "
            "start with paged_cache(model)."
        )
    return fresh
