"""Chunks rewritten in tree order, their pages and the pages' moments."""

import dataclasses

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.tree import take, tree_order


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and per-channel variance of the keys of pages.

    Attributes:
        mean: (streams, pages, head_dim) float32 or float64.
        variance: Same shape and dtype.
        size: Keys of a page.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    size: int

    def first(self, pages: int) -> "Moments":
        """The moments of the first ``pages`` pages."""
        return Moments(self.mean[:, :pages], self.variance[:, :pages], self.size)


def moments_of(keys: torch.Tensor, size: int) -> Moments:
    """Moments of runs of ``size`` of the keys, (streams, keys, head_dim), which are a multiple of it."""
    keys = keys if keys.dtype == torch.float64 else keys.float()
    runs = keys.unflatten(1, (-1, size))
    mean = runs.mean(2, keepdim=True)  # var_mean takes several times as long on a CPU
    return Moments(mean.squeeze(2), (runs - mean).square().mean(2), size)


def mean_values(
    values: torch.Tensor, config: SurgeryConfig, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """Mean values of pages, (streams, pages, value_dim), for unseen ones; None without summaries.

    ``values`` are (streams, n * chunk_size, value_dim) in tree order; the result is float32 unless ``dtype``
    says otherwise, or float64 if given.
    """
    if config.summary == "none":
        return None
    full = values.dtype if values.dtype == torch.float64 else torch.float32
    return values.unflatten(1, (-1, config.page_size)).mean(2, dtype=full).to(dtype or full)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Full chunks in tree order. A *stream* is one KV head of one sequence.

    Attributes:
        keys: (streams, chunks * chunk_size, head_dim) in tree order chunk by chunk.
        values: (streams, chunks * chunk_size, value_dim), the same order.
        order: (streams, chunks, chunk_size) int16, the original offset of every slot.
        moments: Moments of the pages.
        features: What kernels score the pages by, where it was kept: μ and ½·σ² side by side,
            (streams, pages, 2 * head_dim).
        mean_values: From :func:`mean_values`, where kernels read them in the values' dtype; None without
            summaries.
        sink_page: (streams,) int32, the page that holds position 0, where it was kept.
    """

    keys: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor
    moments: Moments
    features: torch.Tensor | None = None
    mean_values: torch.Tensor | None = None
    sink_page: torch.Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.order.shape[1]

    def sink_pages(self, page_size: int) -> torch.Tensor:
        """(streams,) integers: the page that holds position 0."""
        if self.sink_page is not None:
            return self.sink_page
        return (self.order[:, 0] == 0).int().argmax(-1) // page_size


def build_layout(
    keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig, router: PageRouter | None = None
) -> Layout:
    """Lay out full chunks. A chunk's layout depends on that chunk's own keys alone (law 1).

    Args:
        keys: (streams, n * chunk_size, head_dim) after rotary embedding, in order of position.
        values: (streams, n * chunk_size, value_dim).
        router: Learned corrections, one for every KV head, or None.

    Raises:
        SurgeryError: Keys and values of another shape, or on different devices.
    """
    check_chunks(keys, values, config)
    chunked = keys.detach().unflatten(1, (-1, config.chunk_size))
    if router is not None:
        chunked = router.for_streams(keys.shape[0], keys.device).map_keys(chunked)
    order = tree_order(chunked, config.page_size)
    keys, values = reorder(keys, order), reorder(values, order)
    moments = moments_of(keys, config.page_size)
    return Layout(keys, values, order.to(torch.int16), moments, mean_values=mean_values(values, config))


def check_chunks(keys: torch.Tensor, values: torch.Tensor, config: SurgeryConfig) -> None:
    """Raise SurgeryError where they are not keys and values of whole chunks, on one device."""
    fit = keys.dim() == values.dim() == 3 and keys.shape[:2] == values.shape[:2]
    if not fit or keys.shape[1] % config.chunk_size or not keys.shape[1]:
        raise SurgeryError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)}: expected (streams, n * "
            f"{config.chunk_size}, dim), whole chunks."
        )
    if keys.device != values.device:
        raise SurgeryError(f"keys on {keys.device}, values on {values.device}: move them to one device.")


def reorder(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permute every chunk of ``states`` (streams, chunks * chunk_size, dim) by ``order``."""
    chunked = states.unflatten(1, order.shape[1:])
    return take(chunked, order.long()).flatten(1, 2)


def restore(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`reorder`: tree order back to order of position."""
    return reorder(states, order.argsort(dim=-1))
