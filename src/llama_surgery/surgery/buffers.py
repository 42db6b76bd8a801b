"""Preallocated tensors of one operated layer: full chunks in tree order, the rest in order of position."""

import torch

from llama_surgery.attention.api import kernel_features, kernel_moments
from llama_surgery.attention.summary import mean_values
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, Moments

#: What is added when the tensors grow: this part of the length, so that a token is copied a bounded number of
#: times however long the text becomes.
GROWTH = 16

#: Name of the features of the finest level; coarser ones are -2 and -3.
FINEST = "features -1"

#: Name of the mean values of what is summarised.
MEAN_VALUES = "mean values"


def writable(tensor: torch.Tensor) -> bool:
    """Can it be written in place here? What was made in inference mode cannot be outside of it."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class PageBuffers:
    """Keys, values and what is known of their pages, for all streams of a layer, with room to grow.

    Slots up to a sequence's last full chunk are in tree order; behind them slot and position are one. What a
    chunk's layout found is written once, when the chunk is full. Where the Triton kernels serve the layer,
    that is the features they score pages by, in the keys' dtype; elsewhere the moments, in full precision.

    Tensors are written in place, but for two cases, in which they are replaced by a copy first: where
    gradients are recorded, since the backward pass may need what was there, and outside of inference mode if
    they were made inside.

    Attributes:
        capacity: Tokens a sequence has room for, a multiple of ``chunk_size``.
        maximum: Tokens that will never be exceeded, as far as is known: growing goes no further.
        sink_page: (streams,) int32, the page that holds position 0.
    """

    def __init__(self, config: SurgeryConfig, streams: int, device: torch.device) -> None:
        self.config = config
        self.streams = streams
        self.capacity = 0
        self.maximum: int | None = None
        self.sink_page = torch.zeros(streams, dtype=torch.int32, device=device)
        #: Tensors by name, and tokens that an element along their second last dimension stands for.
        self._tensors: dict[str, torch.Tensor] = {}
        self._units: dict[str, int] = {}

    @property
    def empty(self) -> bool:
        """Has nothing been written yet?"""
        return not self._tensors

    @property
    def keys(self) -> torch.Tensor:
        """(streams, capacity, head_dim)."""
        return self._tensors["keys"]

    @property
    def values(self) -> torch.Tensor:
        """(streams, capacity, value_dim)."""
        return self._tensors["values"]

    def read_by_kernels(self) -> tuple[torch.Tensor, ...]:
        """What decode kernels read, at addresses a graph holds.

        Keys, values, features of the finest level as ``kernel_features`` gives them for ``capacity`` tokens,
        sink pages, and the mean values of what is summarised, if anything is.
        """
        pool, dim = self.config.variance_pool, self.keys.shape[-1]
        features = self._held(FINEST, self.config.ball_size, self.keys, dim + dim // pool)
        read = (self.keys, self.values, features, self.sink_page)
        if self.config.summary == "none":
            return read
        size = self.config.summarised
        return *read, self._held(MEAN_VALUES, size, self.values, self.values.shape[-1])

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens a sequence."""
        if tokens <= self.capacity:
            return
        wanted = tokens + tokens // GROWTH
        if self.maximum is not None and self.maximum >= tokens:
            wanted = min(wanted, self.maximum)
        size = self.config.chunk_size
        self.capacity = -(-wanted // size) * size
        for name, old in self._tensors.items():  # one after the other: only one is there twice at a time
            new = self._empty(name, old)
            new.narrow(-2, 0, old.shape[-2]).copy_(old)
            self._tensors[name] = new

    def read(self, streams: slice, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots ``start … stop - 1``, views."""
        return self.keys[streams, start:stop], self.values[streams, start:stop]

    def order(self, streams: slice, start: int, stop: int) -> torch.Tensor:
        """Original offsets (streams, chunks, chunk_size) of the full chunks in slots ``start … stop - 1``."""
        size = self.config.chunk_size
        return self._tensors["order"][streams, start // size : stop // size]

    def write(self, streams: slice, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values (streams, n, dim) from slot ``start`` on."""
        self._put("keys", streams, start, keys.shape[1], keys)
        self._put("values", streams, start, keys.shape[1], values)

    def write_chunks(self, streams: slice, start: int, layout: Layout, *, kernels: bool) -> None:
        """Write full chunks from slot ``start`` on, a multiple of ``chunk_size``.

        Args:
            kernels: Keep what the Triton kernels score by, instead of the moments.
        """
        tokens = layout.keys.shape[1]
        self.write(streams, start, layout.keys, layout.values)
        self._put("order", streams, start, tokens, layout.order)
        if kernels:
            levels = kernel_features(layout.moments, self.config, layout.keys.dtype)
            for index, features in enumerate(levels, start=-len(levels)):
                self._put(f"features {index}", streams, start, tokens, features)
            if self.config.summary != "none":
                means = mean_values(layout.values, self.config).to(layout.values.dtype)
                self._put(MEAN_VALUES, streams, start, tokens, means)
        else:
            self._put("mean", streams, start, tokens, layout.moments.mean)
            self._put("variance", streams, start, tokens, layout.moments.variance)
        if start == 0:
            if not writable(self.sink_page):
                self.sink_page = self.sink_page.clone()
            self.sink_page[streams] = layout.sink_pages(self.config.page_size).int()

    def layout(self, streams: slice, chunks: int) -> Layout:
        """The first ``chunks`` chunks, views."""
        stop = chunks * self.config.chunk_size
        read = {n: self._span(n, streams, stop) for n in self._tensors}
        names = (name for name in read if name.startswith("features"))
        features = tuple(read[name] for name in sorted(names, reverse=True))  # -2 before -1
        if features:
            moments = kernel_moments(features[-1], self.config)
        else:
            moments = Moments(read["mean"], read["variance"], self.config.ball_size)
        return Layout(read["keys"], read["values"], read["order"], moments, features)

    def select(self, streams: torch.Tensor) -> "PageBuffers":
        """Buffers of the given streams (int64 indices, repeats allowed), copied."""
        chosen = PageBuffers(self.config, len(streams), self.sink_page.device)
        chosen.capacity, chosen.maximum = self.capacity, self.maximum
        chosen.sink_page = self.sink_page.index_select(0, streams)
        chosen._tensors = {name: t.index_select(0, streams) for name, t in self._tensors.items()}
        chosen._units = dict(self._units)
        return chosen

    def _held(self, name: str, unit: int, like: torch.Tensor, width: int) -> torch.Tensor:
        """A tensor by name; where nothing was written yet, one to be written to later."""
        if name not in self._tensors:
            self._units[name] = unit
            self._tensors[name] = self._empty(name, like[..., :1].expand(*like.shape[:-1], width))
        return self._tensors[name]

    def _put(self, name: str, streams: slice, start: int, tokens: int, new: torch.Tensor) -> None:
        if not tokens:
            return
        held = self._tensors.get(name)
        if held is None:
            self._units[name] = tokens // new.shape[-2]
            held = self._tensors[name] = self._empty(name, new)
        elif torch.is_grad_enabled() or not writable(held):
            held = self._tensors[name] = held.clone()
        unit = self._units[name]
        held[streams].narrow(-2, start // unit, tokens // unit).copy_(new)

    def _span(self, name: str, streams: slice, stop: int) -> torch.Tensor:
        return self._tensors[name][streams].narrow(-2, 0, stop // self._units[name])

    def _empty(self, name: str, like: torch.Tensor) -> torch.Tensor:
        shape = (self.streams, *like.shape[1:-2], self.capacity // self._units[name], like.shape[-1])
        return like.new_empty(shape)
