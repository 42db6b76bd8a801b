"""Calls in which every row sees everything: decided once, at their first operated layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.paged_layer import PagedLayer
from llama_surgery.surgery.statistics import Counted

#: The model's own attention of a module: f(module, keywords, query, key, value), see ``own_attention``.
Own = Callable[..., torch.Tensor]


@dataclasses.dataclass(eq=False, slots=True)
class Whole:
    """What the first operated layer of a call did, all of whose rows see everything.

    Attributes:
        config: The topology.
        start: Cached tokens of every sequence.
        mask: As transformers gave it.
        query: Shape of the queries.
        key: Shape of the new keys.
        dtype: Of both.
        attention: The model's own attention.
        counted: What a layer has read.
    """

    config: SurgeryConfig
    start: int
    mask: Any
    query: torch.Size
    key: torch.Size
    dtype: torch.dtype
    attention: Own
    counted: tuple[Counted, ...]

    def attend(
        self,
        module: torch.nn.Module,
        layer: LayerSurgery,
        paged: PagedLayer | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        keywords: dict[str, Any],
    ) -> torch.Tensor | None:
        """The same in another layer: (batch, new, heads, value_dim), or None where it differs."""
        if (
            mask is not self.mask
            or layer.config is not self.config
            or query.shape != self.query
            or key.shape != self.key
            or query.dtype != self.dtype
            or torch.is_grad_enabled()
        ):
            return None
        if paged is not None:
            states = paged.follow(self.start, key, value, layer.router)
            if states is None:
                return None
            key, value = states
        layer.count_whole(self.counted)
        return self.attention(module, keywords, query, key, value)
