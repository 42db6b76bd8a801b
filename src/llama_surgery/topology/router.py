"""Learned corrections to the training-free topology of one layer."""

import dataclasses

import torch

from llama_surgery.errors import SurgeryError


@dataclasses.dataclass(frozen=True)
class PageRouter:
    """What is learned about one layer's pages; every part leaves the training-free rule as it is when None.

    Tensors are float32, per query head where budgets and scores are concerned and per KV head where the order
    of keys is. With h query heads in a KV head's group, head ``g·h + i`` is ``[g, i]``.

    Attributes:
        offset: (kv_heads, group) added to log θ: a head with a positive offset opens fewer pages. θ itself
            stays the one global threshold that calibration sets for a density.
        mean_weight: (kv_heads, group, head_dim) weights of the channels of q·μ in the page score.
        variance_weight: (kv_heads, group, head_dim) weights of the channels of q²·σ².
        key_map: (kv_heads, head_dim, head_dim) linear map of keys, ``key_map @ k``, before a chunk's splits.
            It changes which keys are neighbours; keys, moments and scores stay those of the model.
        summary: (kv_heads, group) log of how much the summary of unseen pages counts, where the configuration
            asks for one.
        key_weight: (kv_heads, head_dim) weights of the keys' channels, for the splits alone, before the map.
    """

    offset: torch.Tensor | None = None
    mean_weight: torch.Tensor | None = None
    variance_weight: torch.Tensor | None = None
    key_map: torch.Tensor | None = None
    summary: torch.Tensor | None = None
    key_weight: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts that are there, by name: what an adapter keeps."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device) -> "PageRouter":
        return PageRouter(**{name: part.to(device) for name, part in self.tensors().items()})

    def check(self, kv_heads: int, group: int, head_dim: int) -> None:
        """Raise SurgeryError where a part has another shape, or is not finite."""
        self.check_shapes(kv_heads, group, head_dim)
        for name, part in self.tensors().items():
            if not torch.isfinite(part).all():
                raise SurgeryError(f"router {name} holds NaN or infinity: learn it again.")

    def check_shapes(self, kv_heads: int, group: int, head_dim: int) -> None:
        """:meth:`check` without a look at the numbers, for which a GPU would be waited for."""
        expected = {
            "offset": (kv_heads, group),
            "mean_weight": (kv_heads, group, head_dim),
            "variance_weight": (kv_heads, group, head_dim),
            "key_weight": (kv_heads, head_dim),
            "key_map": (kv_heads, head_dim, head_dim),
            "summary": (kv_heads, group),
        }
        for name, part in self.tensors().items():
            if tuple(part.shape) != expected[name]:
                raise SurgeryError(
                    f"router {name} {tuple(part.shape)}: this layer needs {expected[name]}. It was learned "
                    "for another model."
                )

    def for_streams(self, streams: int, device: torch.device) -> "PageRouter":
        """Contiguous parts with a leading dimension of (sequence, KV head) streams instead of KV heads.

        Raises:
            SurgeryError: There are not as many streams as several sequences have.
        """

        def repeat(part: torch.Tensor) -> torch.Tensor:
            part = part.to(device).contiguous()
            if len(part) == streams:
                return part
            if streams % len(part):
                raise SurgeryError(
                    f"corrections of {len(part)} KV heads for {streams} streams: not a multiple."
                )
            return part.repeat(streams // part.shape[0], *(1 for _ in part.shape[1:]))

        return PageRouter(**{name: repeat(part) for name, part in self.tensors().items()})

    def weigh(self, queries: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the channel weights on what multiplies means and variances: scaled queries, their squares.

        Both are (streams, heads * rows, head_dim).
        """
        return _weighted(queries, self.mean_weight), _weighted(spread, self.variance_weight)

    def map_keys(self, chunked: torch.Tensor) -> torch.Tensor:
        """Keys (streams, chunks, chunk_size, head_dim) as the tree is to see them, in at least float32."""
        if self.key_weight is None and self.key_map is None:
            return chunked
        chunked = chunked if chunked.dtype == torch.float64 else chunked.float()
        if self.key_weight is not None:
            chunked = chunked * self.key_weight.to(chunked)[:, None, None]
        if self.key_map is not None:
            chunked = chunked @ self.key_map.to(chunked).transpose(-1, -2).unsqueeze(1)
        return chunked


def _weighted(states: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return states
    by_head = states.unflatten(1, (weight.shape[1], -1))
    return (by_head * weight.to(states.dtype).unsqueeze(2)).flatten(1, 2)
