"""Keys and values of sequences of one length: full chunks in tree order, the open chunk as it came."""

import copy

import torch

from llama_surgery.attention.api import build_layout
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import (
    Layout,
    Moments,
    extend_layout,
    restore,
)
from llama_surgery.topology.router import PageRouter


class SequenceStore:
    """What a layer remembers of one or more sequences that have equally many tokens.

    A chunk is rewritten in tree order once, in the call that fills it, whatever call that is (law 1).
    Tensors are replaced, never written in place, so a shallow copy is a fork.

    Attributes:
        length: Tokens of each sequence.
        layout: Full chunks, or None; streams are (sequence, KV head) flattened.
    """

    def __init__(self, config: SurgeryConfig) -> None:
        self.config = config
        self.length = 0
        self.layout: Layout | None = None
        self._open_keys: torch.Tensor | None = None  # (sequences, kv_heads, < chunk_size, head_dim)
        self._open_values: torch.Tensor | None = None

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, since: int, router: PageRouter | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens and return the last keys and values in order of position.

        Args:
            keys: (sequences, kv_heads, new, head_dim) after rotary embedding.
            values: (sequences, kv_heads, new, value_dim).
            since: Position from which keys are wanted, a multiple of ``chunk_size``.
            router: The layer's learned corrections, or None.

        Returns:
            Keys and values (streams, positions since … length - 1, dim).

        Raises:
            SurgeryError: NaN or infinite keys (checked on a CPU, where it costs no synchronisation).
        """
        if keys.device.type == "cpu" and not torch.isfinite(keys).all():
            raise SurgeryError(
                "the keys hold NaN or infinity: no order can be made of them. Check the weights and "
                "the inputs, and that the dtype has the range the model needs."
            )
        near = self._near(keys, values, since)
        size, new = self.config.chunk_size, keys.shape[2]
        opened = self.length % size
        if opened and self._open_keys is not None and self._open_values is not None:
            keys = torch.cat((self._open_keys, keys), 2)
            values = torch.cat((self._open_values, values), 2)
        full = (opened + new) // size * size
        if full:
            more = build_layout(
                keys[:, :, :full].flatten(0, 1), values[:, :, :full].flatten(0, 1), self.config, router
            )
            self.layout = more if self.layout is None else extend_layout(self.layout, more)
        # Cloned, so that a view of a few tokens does not keep the whole call's keys alive.
        self._open_keys, self._open_values = keys[:, :, full:].clone(), values[:, :, full:].clone()
        self.length += new
        return near

    def _near(
        self, keys: torch.Tensor, values: torch.Tensor, since: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if since >= self.length:
            skip = since - self.length
            return keys[:, :, skip:].flatten(0, 1), values[:, :, skip:].flatten(0, 1)
        parts_k, parts_v = [], []
        if self.layout is not None and since < self.layout.chunks * self.config.chunk_size:
            order = self.layout.order[:, since // self.config.chunk_size :]
            parts_k.append(restore(self.layout.keys[:, since:], order))
            parts_v.append(restore(self.layout.values[:, since:], order))
        if self._open_keys is not None and self._open_values is not None:
            parts_k.append(self._open_keys.flatten(0, 1))
            parts_v.append(self._open_values.flatten(0, 1))
        parts_k.append(keys.flatten(0, 1))
        parts_v.append(values.flatten(0, 1))
        return torch.cat(parts_k, 1), torch.cat(parts_v, 1)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on; a chunk cut open returns to its order."""
        if length >= self.length:
            return
        size = self.config.chunk_size
        full = length // size
        if self.layout is not None and full < self.layout.chunks:
            kv_heads = self._kv_heads()
            chunk, order = (
                slice(full * size, (full + 1) * size),
                self.layout.order[:, full : full + 1],
            )
            keys = restore(self.layout.keys[:, chunk], order).unflatten(0, (-1, kv_heads))
            values = restore(self.layout.values[:, chunk], order).unflatten(0, (-1, kv_heads))
            self._open_keys, self._open_values = keys, values
            self.layout = _cut(self.layout, full, self.config)
        if self._open_keys is not None and self._open_values is not None:
            rest = length - full * size
            self._open_keys = self._open_keys[:, :, :rest].clone()
            self._open_values = self._open_values[:, :, :rest].clone()
        self.length = length

    def select(self, sequences: torch.Tensor) -> "SequenceStore":
        """A store of the given sequences (int64 indices, repeats allowed)."""
        chosen = self.fork()
        if self._open_keys is None or self._open_values is None:
            return chosen
        kv_heads = self._kv_heads()
        sequences = sequences.to(self._open_keys.device)
        chosen._open_keys = self._open_keys.index_select(0, sequences)
        chosen._open_values = self._open_values.index_select(0, sequences)
        if self.layout is not None:
            heads = torch.arange(kv_heads, device=sequences.device)
            streams = (sequences[:, None] * kv_heads + heads).flatten()
            chosen.layout = _map_layout(self.layout, lambda x: x.index_select(0, streams))
        return chosen

    def fork(self) -> "SequenceStore":
        """A copy that grows on its own; tensors are shared until either grows."""
        return copy.copy(self)

    def _kv_heads(self) -> int:
        assert self._open_keys is not None  # set by the first append
        return self._open_keys.shape[1]


def _map_layout(layout: Layout, function) -> Layout:
    moments = layout.moments
    return Layout(
        function(layout.keys),
        function(layout.values),
        function(layout.order),
        Moments(function(moments.mean), function(moments.variance), moments.size),
    )


def _cut(layout: Layout, chunks: int, config: SurgeryConfig) -> Layout | None:
    if chunks == 0:
        return None
    keys = chunks * config.chunk_size
    return Layout(
        layout.keys[:, :keys],
        layout.values[:, :keys],
        layout.order[:, :chunks],
        layout.moments.first(chunks * config.pages_per_chunk * config.balls_per_page),
    )
