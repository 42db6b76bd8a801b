"""Keys and values of sequences of one length: full chunks in tree order, the open chunk as it came."""

import torch

from llama_surgery.attention.executor import build_layout
from llama_surgery.attention.impl.common import differentiable
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.topology.layout import Layout, restore
from llama_surgery.topology.router import PageRouter

#: Devices whose keys are looked at in every call. Elsewhere the host would have to wait for the answer, and
#: keys that are not finite become NaN in the output instead.
CHECKED_DEVICES = ("cpu",)


class SequenceStore:
    """What a layer remembers of one or more sequences that have equally many tokens.

    A full chunk is rewritten in tree order once, from its own keys alone, when its layout is first asked for
    (law 1): rows that see everything do not ask, unless gradients are recorded.

    Args:
        buffers: Tensors of the layer, of which ``streams`` are the store's own; its own if None.
        streams: Streams are (sequence, KV head) flattened.
        length: Tokens that are there already.
        laid: How many of them are in tree order.
        keep: False for a single call, after which nothing is remembered: nothing is copied either.

    Attributes:
        length: Tokens of each sequence.
        laid: How many of them are in tree order, a multiple of ``chunk_size``.
        keep: Are they remembered after a call?
        router: The layer's learned corrections in the last call, for what is laid out later.
    """

    def __init__(
        self,
        config: SurgeryConfig,
        buffers: PageBuffers | None = None,
        streams: slice = slice(None),
        length: int = 0,
        laid: int = 0,
        *,
        keep: bool = True,
    ) -> None:
        self.config = config
        self.length, self.laid = length, laid
        self._buffers = buffers
        self._streams = streams
        self.keep = keep
        self.router: PageRouter | None = None
        self._passing: Layout | None = None

    @property
    def layout(self) -> Layout | None:
        """Full chunks in tree order, or None where there is none."""
        if not self.keep or self._buffers is None:
            return self._passing
        self.lay_out(self.router)
        return self._buffers.layout(self._streams, self.laid // self.config.chunk_size) if self.laid else None

    def lay_out(self, router: PageRouter | None = None) -> None:
        """Bring full chunks into tree order that are not yet."""
        begin, full = self.laid, self.length // self.config.chunk_size * self.config.chunk_size
        if begin < full and self.keep and self._buffers is not None:
            with self._buffers.recording():
                self._lay_out(begin, *self._buffers.read(self._streams, begin, full), router)

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        since: int,
        router: PageRouter | None = None,
        closed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens and return the last keys and values in order of position.

        Args:
            keys: (sequences, kv_heads, new, head_dim) after rotary embedding.
            values: (sequences, kv_heads, new, value_dim).
            since: Position from which keys are wanted, a multiple of ``chunk_size``.
            router: The layer's learned corrections, or None.
            closed: Chunks that are closed for the last row, which need a layout; None for all full ones.

        Returns:
            Keys and values (streams, positions since … length - 1, dim).

        Raises:
            SurgeryError: NaN or infinite keys on a CPU. On other devices nothing is raised: once the chunk of
                such a key is full, every query of its stream that has a far field gets NaN.
        """
        check_finite(keys)
        self.router = router
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        size, stop = self.config.chunk_size, self.length + keys.shape[1]
        full = (stop // size if closed is None else closed) * size
        if not self.keep:
            near = self._near(keys, values, since)
            self._passing = None
            if full:
                self._passing = build_layout(keys[:, :full], values[:, :full], self.config, router)
                if keys.device.type not in CHECKED_DEVICES:
                    # By-passing autograd, which may have saved them: finite keys stay as they are.
                    self._passing.keys.data[:, :size].add_(nan_where_not_finite(keys[:, :full]))
            self.length = stop
            return near
        buffers = self._reserve(keys)
        if keys.numel() and not (full or self.laid or buffers.recorded or differentiable(keys, values)):
            buffers.write(self._streams, self.length, keys, values)
            self.length = stop
            return buffers.read(self._streams, since, stop)
        near = self._near(keys, values, since)
        self.lay_out(router)
        with buffers.recording():
            self._keep_states(keys, values, router)
        self.length = stop
        return near

    def _reserve(self, keys: torch.Tensor) -> PageBuffers:
        """Room for ``keys`` (streams, new, head_dim)."""
        if self._buffers is None:
            self._buffers = PageBuffers(self.config, keys.shape[0], keys.device)
        self._buffers.reserve(self.length + keys.shape[1])
        return self._buffers

    def _keep_states(self, keys: torch.Tensor, values: torch.Tensor, router: PageRouter | None) -> None:
        assert self._buffers is not None
        size, stop = self.config.chunk_size, self.length + keys.shape[1]
        opened = self.length % size
        begin, full = self.length - opened, (opened + keys.shape[1]) // size * size
        if full:
            whole_keys, whole_values = keys, values
            if opened:
                old_keys, old_values = self._buffers.read(self._streams, begin, self.length)
                whole_keys = torch.cat((old_keys, keys[:, : full - opened]), 1)
                whole_values = torch.cat((old_values, values[:, : full - opened]), 1)
            self._lay_out(begin, whole_keys[:, :full], whole_values[:, :full], router)
            keys, values = keys[:, full - opened :], values[:, full - opened :]
        self._buffers.write(self._streams, stop - keys.shape[1], keys, values)

    def _lay_out(
        self, start: int, keys: torch.Tensor, values: torch.Tensor, router: PageRouter | None
    ) -> None:
        assert self._buffers is not None
        self._buffers.lay_out(self._streams, start, keys, values, router)
        if keys.device.type not in CHECKED_DEVICES:
            self._buffers.taint(self._streams, nan_where_not_finite(keys))
        self.laid = start + keys.shape[1]

    def _near(
        self, keys: torch.Tensor, values: torch.Tensor, since: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if since >= self.length:
            skip = since - self.length
            return keys[:, skip:], values[:, skip:]
        assert self._buffers is not None
        parts = []
        if since < self.laid:
            parts.append(self._restored(since, self.laid))
        parts.append(self._buffers.read(self._streams, max(since, self.laid), self.length))
        parts.append((keys, values))
        near_keys, near_values = (torch.cat(states, 1) for states in zip(*parts, strict=True))
        return near_keys, near_values

    def _restored(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of full chunks in order of position."""
        assert self._buffers is not None
        order = self._buffers.order(self._streams, start, stop)
        keys, values = self._buffers.read(self._streams, start, stop)
        return restore(keys, order), restore(values, order)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on; a chunk cut open returns to its order."""
        if length >= self.length:
            return
        assert self._buffers is not None
        size = self.config.chunk_size
        begin = length // size * size
        self._buffers.renew(begin)
        with self._buffers.recording():
            if begin < length and begin < self.laid:
                self._buffers.write(self._streams, begin, *self._restored(begin, begin + size))
            self._buffers.forget(self._streams, length)
        self.length, self.laid = length, min(self.laid, begin)


def check_finite(keys: torch.Tensor) -> None:
    """Raise SurgeryError for NaN or infinite keys, where they are looked at."""
    if keys.device.type in CHECKED_DEVICES and not torch.isfinite(keys).all():
        raise SurgeryError(
            "the keys hold NaN or infinity: no order can be made of them. Check the weights and "
            "the inputs, and that the dtype has the range the model needs."
        )


def nan_where_not_finite(keys: torch.Tensor) -> torch.Tensor:
    """(streams, 1, 1): NaN for streams of ``keys`` (streams, n, dim) that hold NaN or infinity, 0 for others.

    Added to the keys of the first chunk, whose first page is open to every query with a far field, it keeps
    pages from being chosen by scores that are not numbers in silence.
    """
    return torch.linalg.vector_norm(keys.detach(), torch.inf, (1, 2), keepdim=True) * 0
