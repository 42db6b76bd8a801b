"""Preallocated tensors of one operated layer: full chunks in tree order, the rest in order of position."""

import contextlib
from collections.abc import Iterator

import torch

from llama_surgery.attention.executor import build_layout, kernel_features, kernel_moments, kernels_serve
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.written import Written, writable
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.router import PageRouter

#: What is added when the tensors grow: this part of the length, so that a token is copied a bounded number of
#: times however long the text becomes.
GROWTH = 16

#: Name of what kernels score pages by.
FEATURES = "features"

#: Name of the pages' mean values.
MEAN_VALUES = "mean values"


class PageBuffers:
    """Keys, values and what is known of their pages, for all streams of a layer, with room to grow.

    Slots up to a sequence's last full chunk are in tree order; behind them slot and position are one. What a
    chunk's layout found is written once, when the chunk is full. Pages are known in one form for good,
    decided by the first chunk: where the Triton kernels serve keys of this kind, by the features they score
    pages by, in the keys' dtype; elsewhere by their moments, in full precision.

    Tensors are written in place, also where gradients are recorded: a call only ever hands out views of
    chunks that are full, which are not written again unless the sequence is cropped (:meth:`renew`). Outside
    of inference mode they are replaced by a copy first if they were made inside.

    Attributes:
        capacity: Tokens a sequence has room for, a multiple of ``chunk_size``.
        maximum: Tokens that will never be exceeded, as far as is known: growing goes no further.
        kernels: Are pages known by the kernels' features, not by moments? None before that was asked.
    """

    def __init__(self, config: SurgeryConfig, streams: int, device: torch.device) -> None:
        self.config = config
        self.streams = streams
        self.capacity = 0
        self.maximum: int | None = None
        self.device = device
        self.kernels: bool | None = None
        self._sink_page: torch.Tensor | None = None
        self._lent = 0  # slots before this one may be needed as they are by a backward pass
        #: Tensors by name, and tokens that an element along their second last dimension stands for.
        self._tensors: dict[str, torch.Tensor] = {}
        self._units: dict[str, int] = {}
        self._inference = False  # were some made in inference mode?
        #: Keys and values (sequences, kv_heads, capacity, dim) as :meth:`extend` writes them, after whether
        #: it does in inference mode.
        self._whole: tuple[bool, torch.Tensor, torch.Tensor] | None = None

    @property
    def sink_page(self) -> torch.Tensor:
        """(streams,) int32, the page that holds position 0."""
        if self._sink_page is None or not writable(self._sink_page):
            old = self._sink_page
            zeros = torch.zeros(self.streams, dtype=torch.int32, device=self.device)
            self._sink_page = zeros if old is None else zeros.copy_(old)
        return self._sink_page

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

    def read_by_kernels(self, *, whole: bool = False) -> tuple[torch.Tensor, ...]:
        """What decode kernels read, at addresses a graph holds.

        Keys and values; unless rows see the ``whole`` of them, also features as ``kernel_features`` gives
        them for ``capacity`` tokens, sink pages, and the mean values of pages where they are summarised.
        """
        if whole:
            return self.keys, self.values
        features = self._held(FEATURES, self.config.page_size, self.keys, 2 * self.keys.shape[-1])
        read = (self.keys, self.values, features, self.sink_page)
        if self.config.summary == "none":
            return read
        return *read, self._held(MEAN_VALUES, self.config.page_size, self.values, self.values.shape[-1])

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens a sequence, in tensors that this call can write and record."""
        if self._inference and not torch.is_inference_mode_enabled():
            for name, held in self._tensors.items():
                if not writable(held):
                    self._set(name, held.clone())
            self._inference = False
        if tokens <= self.capacity:
            return
        wanted = tokens + tokens // GROWTH
        if self.maximum is not None and self.maximum >= tokens:
            wanted = min(wanted, self.maximum)
        size = self.config.chunk_size
        self.capacity = -(-wanted // size) * size
        if not self._tensors:
            return
        with self.recording():
            for name, old in self._tensors.items():  # one after the other: only one is there twice at a time
                new = self._empty(name, old, old.shape[-1])
                new.narrow(-2, 0, old.shape[-2]).copy_(old)
                self._set(name, new)

    def extend(
        self, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states (sequences, kv_heads, new, dim) of all streams from slot ``start`` on, unrecorded.

        Returns:
            Keys and values (sequences, kv_heads, start + new, dim) of all slots so far, views.
        """
        new, inference = keys.shape[2], torch.is_inference_mode_enabled()
        self.reserve(start + new)
        if self._whole is None or self._whole[0] is not inference:
            held = (
                self._held(name, 1, like, like.shape[-1]).data.view(*like.shape[:2], -1, like.shape[-1])
                for name, like in (("keys", keys), ("values", values))
            )
            self._whole = inference, *held
        _, held_keys, held_values = self._whole
        held_keys.narrow(2, start, new).copy_(keys)
        held_values.narrow(2, start, new).copy_(values)
        return held_keys.narrow(2, 0, start + new), held_values.narrow(2, 0, start + new)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name], self._whole = tensor, None
        self._inference = self._inference or tensor.is_inference()

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

    def lay_out(
        self, streams: slice, start: int, keys: torch.Tensor, values: torch.Tensor, router: PageRouter | None
    ) -> None:
        """Write whole chunks (streams, n, dim) in tree order from slot ``start`` on, which begins a chunk."""
        kernels = self.decide(keys, values)
        into = self._room(streams, start, keys, values) if kernels else None
        if into is not None and into.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr():
            keys, values = keys.clone(), values.clone()  # what is written must not be what is read
        layout = build_layout(keys, values, self.config, router, kernels=kernels, into=into)
        if into is None:
            self.write_chunks(streams, start, layout)

    def _room(self, streams: slice, start: int, keys: torch.Tensor, values: torch.Tensor) -> Layout | None:
        """Where the kernels may write a layout of keys and values; None where gradients are recorded."""
        config, stop = self.config, start + keys.shape[1]
        if differentiable(keys, values) or self.recorded or not all(map(writable, self._tensors.values())):
            return None
        self._held("order", config.chunk_size, keys.new_empty(0, dtype=torch.int16), config.chunk_size)
        page, dim, value_dim = config.page_size, keys.shape[-1], values.shape[-1]
        self._held("keys", 1, keys, dim)
        self._held("values", 1, values, value_dim)
        self._held(FEATURES, page, keys, 2 * dim)
        if config.summary != "none":
            self._held(MEAN_VALUES, page, values, value_dim)
        room = {
            name: held.data[streams, start // self._units[name] : stop // self._units[name]]
            for name, held in self._tensors.items()
        }
        kept = room[FEATURES], room.get(MEAN_VALUES), None if start else self.sink_page[streams]
        moments = kernel_moments(room[FEATURES], page)
        return Layout(room["keys"], room["values"], room["order"], moments, *kept)

    def write_chunks(self, streams: slice, start: int, layout: Layout) -> None:
        """Write chunks that are laid out from slot ``start`` on, a multiple of ``chunk_size``."""
        tokens = layout.keys.shape[1]
        self.write(streams, start, layout.keys, layout.values)
        self._put("order", streams, start, tokens, layout.order)
        if self.kernels:
            self._put(FEATURES, streams, start, tokens, kernel_features(layout, layout.keys.dtype))
        else:
            self._put("mean", streams, start, tokens, layout.moments.mean)
            self._put("variance", streams, start, tokens, layout.moments.variance)
        if layout.mean_values is not None:
            means = layout.mean_values.to(layout.keys.dtype) if self.kernels else layout.mean_values
            self._put(MEAN_VALUES, streams, start, tokens, means)
        if start == 0:
            self.sink_page[streams] = layout.sink_pages(self.config.page_size).int()

    def taint(self, streams: slice, addend: torch.Tensor) -> None:
        """Add NaN, or 0, to the keys of the first chunk: ``addend`` is (streams, 1, 1)."""
        self.keys.data[streams, : self.config.chunk_size].add_(addend)

    def renew(self, start: int) -> None:
        """Go on with copies if slots from ``start`` on, soon to be written again, may still be needed."""
        if start < self._lent:
            with self.recording():
                for name, tensor in self._tensors.items():
                    self._set(name, tensor.clone())
            self._lent = 0

    def forget(self, streams: slice, start: int) -> None:
        """No gradient may reach what is in slots from ``start`` on, whoever writes there next."""
        for name, held in self._tensors.items():
            first = -(-start // self._units[name])
            if held.requires_grad and first < held.shape[-2]:
                stale = held.data[streams].narrow(-2, first, held.shape[-2] - first)
                self._set(name, Written.apply(held, stale, streams, first))

    def layout(self, streams: slice, chunks: int) -> Layout:
        """The first ``chunks`` chunks, views."""
        stop = chunks * self.config.chunk_size
        if torch.is_grad_enabled():
            self._lent = max(self._lent, stop)
        read = {name: held[streams, : stop // self._units[name]] for name, held in self._tensors.items()}
        if self.kernels:
            moments = kernel_moments(read[FEATURES], self.config.page_size)
        else:
            moments = Moments(read["mean"], read["variance"], self.config.page_size)
        kept = read.get(FEATURES), read.get(MEAN_VALUES), self.sink_page[streams]
        return Layout(read["keys"], read["values"], read["order"], moments, *kept)

    def select(self, streams: torch.Tensor) -> "PageBuffers":
        """Buffers of the given streams (int64 indices, repeats allowed), copied."""
        chosen = PageBuffers(self.config, len(streams), self.device)
        chosen.capacity, chosen.maximum, chosen.kernels = self.capacity, self.maximum, self.kernels
        chosen._sink_page = self.sink_page.index_select(0, streams)
        for name, tensor in self._tensors.items():
            chosen._set(name, tensor.index_select(0, streams))
        chosen._units = dict(self._units)
        return chosen

    def _held(self, name: str, unit: int, like: torch.Tensor, width: int) -> torch.Tensor:
        """A tensor by name; where nothing was written yet, one to be written to later."""
        if name not in self._tensors:
            self._units[name] = unit
            self._set(name, self._empty(name, like, width))
        return self._tensors[name]

    def _put(self, name: str, streams: slice, start: int, tokens: int, new: torch.Tensor) -> None:
        if not tokens:
            return
        if name not in self._tensors:
            self._units[name] = tokens // new.shape[-2]
            self._set(name, self._empty(name, new, new.shape[-1]))
        held, start = self._tensors[name], start // self._units[name]
        if not writable(held):
            held = held.clone()
        if held.requires_grad or (torch.is_grad_enabled() and new.requires_grad):
            held = Written.apply(held, new, streams, start)
        else:
            held.data[streams].narrow(-2, start, new.shape[-2]).copy_(new)
        if held is not self._tensors[name]:
            self._set(name, held)

    def _empty(self, name: str, like: torch.Tensor, width: int) -> torch.Tensor:
        return like.new_empty(self.streams, self.capacity // self._units[name], width)
