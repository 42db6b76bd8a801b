"""What an operated attention module carries."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.executor import resolve
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.paged_layer import PagedLayer
from llama_surgery.surgery.statistics import Counted, Counters
from llama_surgery.topology.router import PageRouter

#: Attribute of an operated attention module that holds its :class:`LayerSurgery`.
ATTRIBUTE = "_llama_surgery"


@dataclasses.dataclass
class LayerSurgery:
    """What an operated attention module carries.

    Attributes:
        config: The operation's configuration.
        router: Learned corrections, or None.
        counters: Counts by tile size.
    """

    config: SurgeryConfig
    router: PageRouter | None = None
    counters: dict[int, Counters] = dataclasses.field(default_factory=dict)
    placed: tuple[PageRouter | None, torch.device | None] = None, None  # which router is known to be where

    def call(
        self, paged: PagedLayer, tile: int, query: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
    ) -> AttentionCall:
        """How rows in tiles of ``tile`` are executed: decided once for a cache.

        Args:
            paged: The layer's cache.
            tile: Queries of a tile.
            query: (..., head_dim), for its device and dtype.
            value: (..., value_dim).
            keywords: What transformers passes to attention functions.

        Raises:
            SurgeryError: The backend asked for by name cannot run the call.
        """
        # Corrections that are learned have gradients in some modes, and not in others.
        given = (self.config, self.router, query.dtype, torch.is_grad_enabled())
        held = paged.calls.get(tile)
        if held is None or any(a is not b for a, b in zip(held[0], given, strict=True)):
            options = {"scale": keywords.get("scaling"), "softcap": keywords.get("softcap")}
            made = resolve(self.config, query, value, tile, router=self.router, **options)
            held = paged.calls[tile] = given, made
        return held[1]

    def counts(self, tile: int) -> Counters:
        """Counts of tiles of this size."""
        return self.counters.setdefault(tile, Counters())

    def count_whole(self, counted: Iterable[Counted]) -> None:
        """Count what rows that saw everything have read."""
        for read in counted:
            self.counts(read.tile).add_whole(read)

    def move_router(self, device: torch.device) -> None:
        """Have the router where the layer is computed: where weights are offloaded, only a call tells."""
        if self.router is None or (self.placed[0] is self.router and self.placed[1] == device):
            return
        if any(tensor.device != device for tensor in self.router.tensors().values()):
            self.router = self.router.to(device)
        self.placed = self.router, device
