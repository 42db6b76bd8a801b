"""What an operated attention module carries."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.statistics import Counters
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import ShareListener

#: Attribute of an operated attention module that holds its :class:`LayerSurgery`.
ATTRIBUTE = "_llama_surgery"


@dataclasses.dataclass
class LayerSurgery:
    """What an operated attention module carries.

    Attributes:
        config: The operation's configuration.
        router: Learned corrections, or None.
        counters: Counts by tile size.
        listener: Hears (layer, tile, log shares, block) while calibrating.
        hear_queries: Hears a call's queries (batch, heads, rows, head_dim) and the number of KV heads while
            the metric is measured.
        executed: What will be executed afterwards, where a listener is to hear the shares of that.
    """

    config: SurgeryConfig
    router: PageRouter | None = None
    counters: dict[int, Counters] = dataclasses.field(default_factory=dict)
    listener: Callable[[int, ShareListener], None] | None = None
    hear_queries: Callable[[torch.Tensor, int], None] | None = None
    executed: SurgeryConfig | None = None

    def move_router(self, device: torch.device) -> None:
        """Have the router where the layer is computed: where weights are offloaded, only a call tells."""
        if self.router is not None and any(t.device != device for t in self.router.tensors().values()):
            self.router = self.router.to(device)


@contextlib.contextmanager
def listening(layers: dict[int, LayerSurgery], listener: Any, executed: SurgeryConfig):
    """Let ``listener(layer, tile, shares, block)`` hear every selection, as it will be in ``executed``."""
    for index, layer in layers.items():
        layer.listener, layer.executed = functools.partial(listener, index), executed
    try:
        yield
    finally:
        for layer in layers.values():
            layer.listener = layer.executed = None
