"""The dense side of a whole model's times."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, StaticCache

from llama_surgery.surgery.compat import cache_name

from .dense import Way

#: Name of the dense attention function in transformers' table; it must avoid the library's own words.
INTERFACE = "surgery_dense_rival"


class DenseModel:
    """A dense model that reads the first tokens of a preallocated cache, by a given way.

    Args:
        model: Not operated.
        length: Tokens of the prompt.
        room: Tokens of the cache.
    """

    def __init__(self, model: PreTrainedModel, length: int, room: int) -> None:
        self.model, self.length, self.room = model, length, room
        self.way = Way("PyTorch's choice", None)
        self.visible = length
        self._before = model.config.get_text_config()._attn_implementation
        AttentionInterface.register(INTERFACE, self._attend)
        model.set_attn_implementation(INTERFACE)

    def close(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._before)
        AttentionInterface._global_mapping.pop(INTERFACE, None)

    def cache(self) -> StaticCache:
        """An empty cache."""
        return StaticCache(config=self.model.config, max_cache_len=self.room)

    def step(self, last: torch.Tensor, cache: StaticCache) -> Callable[[], torch.Tensor]:
        """A decode step after the prompt, for logits. Every call reads as many keys, wherever it writes.

        Args:
            last: (batch, 1) int64, the next tokens.
            cache: Holds the prompt.
        """
        positions = torch.full_like(last, self.length)
        arguments = {"use_cache": True, cache_name(self.model): cache}
        return lambda: self.model(last, position_ids=positions, **arguments).logits

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        out = self.way(query, key[:, :, : self.visible], value[:, :, : self.visible], scaling)
        return out.transpose(1, 2).contiguous(), None


def repeat_static(cache: StaticCache, batch: int) -> None:
    """Make ``batch`` sequences of a cache that holds one."""
    for layer in cache.layers:
        layer.keys = layer.keys.repeat_interleave(batch, 0)
        layer.values = layer.values.repeat_interleave(batch, 0)
