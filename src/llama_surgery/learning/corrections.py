"""What can be learned about every layer, as parameters that start at the training-free topology."""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter

#: What can be learned beside budgets, the log-θ offset of every head, which always are. ``channels``: weights
#: of the mean and of the variance term for every head and channel. ``tree``: a map of the keys of every KV
#: head before the splits. ``summary``: how much the summary of unseen pages counts for every head.
Part = Literal["channels", "tree", "summary"]

#: Rank of what the map of the keys adds to its diagonal.
MAP_RANK = 8


class LayerCorrections(torch.nn.Module):
    """Parameters of one layer, float32. All zeros but ``map_right`` is the training-free topology.

    ``key_weight`` (kv_heads, head_dim), None until it is set, goes with them.

    Args:
        kv_heads: KV heads.
        group: Query heads of each.
        head_dim: Channels of a key.
        parts: What is learned.
        seed: Of the map's right factor, which only matters once the left one has left zero.

    Raises:
        SurgeryError: An unknown part.
    """

    def __init__(self, kv_heads: int, group: int, head_dim: int, parts: Collection[Part], seed: int) -> None:
        super().__init__()
        unknown = sorted(set(parts) - set(get_args(Part)))
        if unknown:
            raise SurgeryError(f"parts={list(parts)}: allowed are {', '.join(get_args(Part))}.")
        zeros = torch.zeros
        #: Metric of the queries that keys are sorted in: measured, not learned, and measured again for a
        #: run that goes on.
        self.register_buffer("key_weight", None, persistent=False)
        self.offset = torch.nn.Parameter(zeros(kv_heads, group))
        if "channels" in parts:
            self.log_mean_weight = torch.nn.Parameter(zeros(kv_heads, group, head_dim))
            self.log_variance_weight = torch.nn.Parameter(zeros(kv_heads, group, head_dim))
        if "summary" in parts:
            self.summary = torch.nn.Parameter(zeros(kv_heads, group))
        if "tree" in parts:
            generator = torch.Generator().manual_seed(seed)
            right = torch.randn(kv_heads, MAP_RANK, head_dim, generator=generator) / head_dim**0.5
            self.map_log_diagonal = torch.nn.Parameter(zeros(kv_heads, head_dim))
            self.map_left = torch.nn.Parameter(zeros(kv_heads, head_dim, MAP_RANK))
            self.map_right = torch.nn.Parameter(right)

    def router(self) -> PageRouter:
        """The corrections as the topology takes them, differentiable."""
        values: dict[str, torch.Tensor] = {"offset": self.offset}
        if self.key_weight is not None:
            values["key_weight"] = self.key_weight
        if hasattr(self, "log_mean_weight"):
            values["mean_weight"] = self.log_mean_weight.exp()
            values["variance_weight"] = self.log_variance_weight.exp()
        if hasattr(self, "summary"):
            values["summary"] = self.summary
        if hasattr(self, "map_left"):
            values["key_map"] = torch.diag_embed(self.map_log_diagonal.exp()) + self.map_left @ self.map_right
        return PageRouter(**values)


class Corrections(torch.nn.ModuleDict):
    """Corrections of all operated layers, keyed by the layer's index as text."""

    @classmethod
    def build(
        cls, shapes: Mapping[int, tuple[int, int, int]], parts: Collection[Part], seed: int
    ) -> "Corrections":
        """
        Args:
            shapes: KV heads, group and head_dim of every operated layer.
            parts: What is learned.
            seed: Of the starting values.
        """
        layers = {str(i): LayerCorrections(*shape, parts, seed + i) for i, shape in shapes.items()}
        return cls(layers)


def scorer_parameters(corrections: Corrections) -> dict[int, PageRouter]:
    """What ``operate(model, config, routers=…)`` and an adapter take, by layer index; without gradient."""
    routers = {}
    for index, layer in corrections.items():
        parts = layer.router().tensors()
        routers[int(index)] = PageRouter(**{name: part.detach().clone() for name, part in parts.items()})
    return routers
