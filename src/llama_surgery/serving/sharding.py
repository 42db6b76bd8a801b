"""Tensor parallelism: learned corrections cut by KV head, as the engine cuts keys and values."""

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter


def kv_heads_of_rank(kv_heads: int, rank: int, ranks: int) -> slice:
    """The KV heads that a tensor rank holds.

    Raises:
        SurgeryError: The heads cannot be dealt out evenly.
    """
    if ranks < 1 or kv_heads % ranks or not 0 <= rank < ranks:
        raise SurgeryError(
            f"{kv_heads} KV heads on {ranks} tensor ranks: every rank needs equally many, at least one. "
            f"Use a divisor of {kv_heads}."
        )
    share = kv_heads // ranks
    return slice(rank * share, (rank + 1) * share)


class RouterShard(torch.nn.Module):
    """A rank's part of a layer's learned corrections, as parameters that the engine's loader fills.

    Args:
        parts: Names of the parts that the checkpoint holds.
        kv_heads: Of the whole layer.
        group: Query heads of a KV head.
        head_dim: Of the layer.
        rank: Tensor rank.
        ranks: Tensor ranks.

    Raises:
        SurgeryError: The heads cannot be dealt out, or a part is not known.
    """

    def __init__(
        self, parts: list[str], kv_heads: int, group: int, head_dim: int, rank: int, ranks: int
    ) -> None:
        super().__init__()
        self._heads = kv_heads_of_rank(kv_heads, rank, ranks)
        shapes = {
            "offset": (group,),
            "mean_weight": (group, head_dim),
            "variance_weight": (group, head_dim),
            "key_weight": (head_dim,),
            "key_map": (head_dim, head_dim),
            "summary": (group,),
        }
        unknown = sorted(set(parts) - shapes.keys())
        if unknown:
            raise SurgeryError(
                f"learned corrections {', '.join(unknown)} are not served; served are {', '.join(shapes)}."
            )
        for part in parts:
            weight = torch.nn.Parameter(
                torch.zeros(kv_heads // ranks, *shapes[part], dtype=torch.float32), requires_grad=False
            )
            weight.weight_loader = self.load  # type: ignore[attr-defined]
            self.register_parameter(part, weight)

    def load(self, weight: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """Take the rank's heads out of the whole layer's tensor."""
        weight.data.copy_(whole[self._heads])

    def router(self) -> PageRouter | None:
        """The corrections of the rank's KV heads; None where there are none."""
        parts = dict(self.named_parameters())
        return PageRouter(**parts) if parts else None
