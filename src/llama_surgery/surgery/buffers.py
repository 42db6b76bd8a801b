"""Preallocated tensors of one operated layer: full chunks in tree order, the rest in order of position."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from llama_surgery.attention.executor import kernel_features, kernel_moments, kernels_serve
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Layout, Moments

#: What is added when the tensors grow: this part of the length, so that a token is copied a bounded number of
#: times however long the text becomes.
GROWTH = 16

#: Name of what kernels score pages by.
FEATURES = "features"

#: Name of the pages' mean values.
MEAN_VALUES = "mean values"


def writable(tensor: torch.Tensor) -> bool:
    """Can it be written in place here? What was made in inference mode cannot be outside of it."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class _Written(torch.autograd.Function):
    """A tensor after a write in place, as a new tensor on the same memory, for the sake of gradients.

    Those of the written part go to what was written, all others to the tensor as it was. Nothing is copied
    but what is written: autograd's own in-place copy would not let an earlier call keep a view of the rest.
    """

    @staticmethod
    def forward(ctx: Any, held: torch.Tensor, new: torch.Tensor, streams: slice, start: int) -> torch.Tensor:
        ctx.streams, ctx.start, ctx.length = streams, start, new.shape[-2]
        memory = held.data
        memory[streams].narrow(-2, start, ctx.length).copy_(new)
        return memory

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        held = new = None
        if ctx.needs_input_grad[1]:
            new = gradient[ctx.streams].narrow(-2, ctx.start, ctx.length)
        if ctx.needs_input_grad[0]:
            held = gradient.clone()
            held[ctx.streams].narrow(-2, ctx.start, ctx.length).zero_()
        return held, new, None, None


class PageBuffers:
    """Keys, values and what is known of their pages, for all streams of a layer, with room to grow.

    Slots up to a sequence's last full chunk are in tree order; behind them slot and position are one. What a
    chunk's layout found is written once, when the chunk is full. Pages are known in one form for good,
    decided by the first write: where the Triton kernels serve keys of this kind, by the features they score
    pages by, in the keys' dtype; elsewhere by their moments, in full precision.

    Tensors are written in place, also where gradients are recorded: a call only ever hands out views of
    chunks that are full, which are not written again unless the sequence is cropped (:meth:`renew`). Outside
    of inference mode they are replaced by a copy first if they were made inside.

    Attributes:
        capacity: Tokens a sequence has room for, a multiple of ``chunk_size``.
        maximum: Tokens that will never be exceeded, as far as is known: growing goes no further.
        sink_page: (streams,) int32, the page that holds position 0.
        kernels: Are pages known by the kernels' features, not by moments? None before the first write.
    """

    def __init__(self, config: SurgeryConfig, streams: int, device: torch.device) -> None:
        self.config = config
        self.streams = streams
        self.capacity = 0
        self.maximum: int | None = None
        self.sink_page = torch.zeros(streams, dtype=torch.int32, device=device)
        self.kernels: bool | None = None
        self._lent = 0  # slots before this one may be needed as they are by a backward pass
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

        Keys, values, features as ``kernel_features`` gives them for ``capacity`` tokens, sink pages, and the
        mean values of pages where they are summarised.
        """
        features = self._held(FEATURES, self.config.page_size, self.keys, 2 * self.keys.shape[-1])
        read = (self.keys, self.values, features, self.sink_page)
        if self.config.summary == "none":
            return read
        return *read, self._held(MEAN_VALUES, self.config.page_size, self.values, self.values.shape[-1])

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens a sequence, in tensors that this call can write and record."""
        if not torch.is_inference_mode_enabled():
            for name, held in self._tensors.items():
                if not writable(held):
                    self._tensors[name] = held.clone()
        if tokens <= self.capacity:
            return
        wanted = tokens + tokens // GROWTH
        if self.maximum is not None and self.maximum >= tokens:
            wanted = min(wanted, self.maximum)
        size = self.config.chunk_size
        self.capacity = -(-wanted // size) * size
        with self.recording():
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

    @property
    def recorded(self) -> bool:
        """Do gradients reach what an earlier call wrote?"""
        return any(tensor.requires_grad for tensor in self._tensors.values())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Move what is held, whatever the mode of this call: gradients of earlier ones go the same way."""
        if not self.recorded:
            yield
            return
        with torch.inference_mode(False), torch.enable_grad():
            yield

    def decide(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """:attr:`kernels`, decided for good by the first keys and values."""
        if self.kernels is None:
            # Of the keys' kind alone: calls on one cache may differ in whether they record gradients.
            self.kernels = kernels_serve(self.config, keys.detach(), values.detach())
        return self.kernels

    def write(self, streams: slice, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values (streams, n, dim) from slot ``start`` on."""
        self.decide(keys, values)
        self._put("keys", streams, start, keys.shape[1], keys)
        self._put("values", streams, start, keys.shape[1], values)

    def write_chunks(self, streams: slice, start: int, layout: Layout) -> None:
        """Write full chunks from slot ``start`` on, a multiple of ``chunk_size``."""
        tokens = layout.keys.shape[1]
        self.write(streams, start, layout.keys, layout.values)
        self._put("order", streams, start, tokens, layout.order)
        if self.kernels:
            features = kernel_features(layout.moments, layout.keys.dtype)
            self._put(FEATURES, streams, start, tokens, features)
        else:
            self._put("mean", streams, start, tokens, layout.moments.mean)
            self._put("variance", streams, start, tokens, layout.moments.variance)
        if layout.mean_values is not None:
            means = layout.mean_values.to(layout.keys.dtype) if self.kernels else layout.mean_values
            self._put(MEAN_VALUES, streams, start, tokens, means)
        if start == 0:
            if not writable(self.sink_page):
                self.sink_page = self.sink_page.clone()
            self.sink_page[streams] = layout.sink_pages(self.config.page_size).int()

    def taint(self, streams: slice, addend: torch.Tensor) -> None:
        """Add NaN, or 0, to the keys of the first chunk: ``addend`` is (streams, 1, 1)."""
        self.keys.data[streams, : self.config.chunk_size].add_(addend)

    def renew(self, start: int) -> None:
        """Go on with copies if slots from ``start`` on, soon to be written again, may still be needed."""
        if start < self._lent:
            with self.recording():
                self._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
            self._lent = 0

    def forget(self, streams: slice, start: int) -> None:
        """No gradient may reach what is in slots from ``start`` on, whoever writes there next."""
        for name, held in self._tensors.items():
            first = -(-start // self._units[name])
            if held.requires_grad and first < held.shape[-2]:
                stale = held.data[streams].narrow(-2, first, held.shape[-2] - first)
                self._tensors[name] = _Written.apply(held, stale, streams, first)

    def layout(self, streams: slice, chunks: int) -> Layout:
        """The first ``chunks`` chunks, views."""
        stop = chunks * self.config.chunk_size
        if torch.is_grad_enabled():
            self._lent = max(self._lent, stop)
        read = {n: self._span(n, streams, stop) for n in self._tensors}
        if self.kernels:
            moments = kernel_moments(read[FEATURES], self.config.page_size)
        else:
            moments = Moments(read["mean"], read["variance"], self.config.page_size)
        return Layout(
            read["keys"], read["values"], read["order"], moments, read.get(FEATURES), read.get(MEAN_VALUES)
        )

    def select(self, streams: torch.Tensor) -> "PageBuffers":
        """Buffers of the given streams (int64 indices, repeats allowed), copied."""
        chosen = PageBuffers(self.config, len(streams), self.sink_page.device)
        chosen.capacity, chosen.maximum, chosen.kernels = self.capacity, self.maximum, self.kernels
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
        if name not in self._tensors:
            self._units[name] = tokens // new.shape[-2]
            self._tensors[name] = self._empty(name, new)
        held, start = self._tensors[name], start // self._units[name]
        if not writable(held):
            held = held.clone()
        if held.requires_grad or (torch.is_grad_enabled() and new.requires_grad):
            held = _Written.apply(held, new, streams, start)
        else:
            held.data[streams].narrow(-2, start, new.shape[-2]).copy_(new)
        self._tensors[name] = held

    def _span(self, name: str, streams: slice, stop: int) -> torch.Tensor:
        return self._tensors[name][streams].narrow(-2, 0, stop // self._units[name])

    def _empty(self, name: str, like: torch.Tensor) -> torch.Tensor:
        shape = (self.streams, *like.shape[1:-2], self.capacity // self._units[name], like.shape[-1])
        return like.new_empty(shape)
