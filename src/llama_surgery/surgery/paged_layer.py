"""The cache of one operated layer, whose full chunks are in tree order."""

import torch
from transformers.cache_utils import CacheLayerMixin

from llama_surgery.attention.call import AttentionCall
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.rows import columns_of
from llama_surgery.surgery.store import SequenceStore, check_finite
from llama_surgery.surgery.written import writable
from llama_surgery.topology.router import PageRouter


class PagedLayer(CacheLayerMixin):
    """Cache of one operated layer.

    Padding is never stored: every sequence holds its real tokens only, at their real positions. While
    all sequences have one length they share a store; they are kept apart from the first padding on. The
    tensors are those of the layer in both cases.

    Args:
        keep: False for a single call, after which nothing is remembered.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: SurgeryConfig, *, keep: bool = True) -> None:
        super().__init__()
        self.config = config
        self.keep = keep
        self.slots = 0  # columns seen, padding included: what transformers calls the length
        self.cropped = 0  # columns that are gone: the next call's mask tells how many of them were tokens
        self.maximum: int | None = None  # columns there will ever be, as far as is known
        self.stores: list[SequenceStore] = []
        self.buffers: PageBuffers | None = None
        self.batch = 0
        self.kv_heads = 0
        self.calls: dict[int, tuple[tuple[object, ...], AttentionCall]] = {}  # of LayerSurgery, by tile
        self.recording = False  # a CUDA graph is being captured: what happens on the host is done at replays
        self._device_lengths: torch.Tensor | None = None
        self._known_lengths: list[int] = []  # what the device holds

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch, self.kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        # Model code asks whether a layer holds any: the tensors of a dense layer, of which there are none.
        self.keys = self.values = key_states.new_empty(0)
        self.buffers = PageBuffers(self.config, self.batch * self.kv_heads, self.device)
        self.stores = self._stores([(0, 0)])
        self.is_initialized = True

    def _stores(self, held: list[tuple[int, int]]) -> list[SequenceStore]:
        """Stores of one sequence each or, if it is only one, of all; ``held``: tokens, and those in order."""
        heads = self.batch * self.kv_heads // len(held)
        return [
            SequenceStore(self.config, self.buffers, slice(i * heads, (i + 1) * heads), *each, keep=self.keep)
            for i, each in enumerate(held)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise UnsupportedModelError: operated attention fills the layer, see :meth:`PagedCache.update`."""
        raise UnsupportedModelError(
            "a paged cache, but the attention that fills it is not operated: after eject(model), start "
            "with a new cache. (On an operated model: call the model, neither its forward() nor a layer by "
            "itself; or this architecture hides its cache, which is not supported.)"
        )

    def extend(
        self, keys: torch.Tensor, values: torch.Tensor, router: PageRouter | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens to the only store, unrecorded, of which no row needs a layout yet.

        Args:
            keys: (batch, kv_heads, new, head_dim).
            values: (batch, kv_heads, new, value_dim).
            router: The layer's learned corrections, or None.

        Returns:
            Views (batch, kv_heads, length, dim) of all keys and values: full chunks in whatever order they
            are in, the rest in order of position.

        Raises:
            SurgeryError: NaN or infinite keys on a CPU, see :meth:`SequenceStore.append`.
        """
        check_finite(keys)
        (store,), buffers = self.stores, self.buffers
        assert buffers is not None
        held = buffers.extend(store.length, keys, values)
        store.length += keys.shape[2]
        store.router = router
        return held

    def follow(
        self, start: int, keys: torch.Tensor, values: torch.Tensor, router: PageRouter | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """:meth:`take` and :meth:`extend` by columns that another layer has taken just so.

        None, with nothing done, where this layer does not hold ``start`` tokens of all sequences.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if len(self.stores) > 1 or not self.stores[0].length == self.slots == start:
            return None
        if self.buffers is not None:
            self.buffers.maximum = self.maximum
        self.slots += keys.shape[2]
        return self.extend(keys, values, router)

    def take(
        self,
        mask: torch.Tensor | None,
        batch: int,
        new: int,
        like: tuple[torch.Tensor, torch.Tensor],
        *,
        apart: bool = False,
    ) -> list[tuple[SequenceStore, slice, torch.Tensor | None]]:
        """Stores that receive the next ``new`` columns, and the columns each receives.

        Args:
            mask: (batch, slots + new) bool, True for real tokens, or None if all are.
            batch: Sequences of the call.
            new: Columns of the call.
            like: New keys and values.
            apart: Is every sequence to have a store of its own, though they have one length so far?

        Returns:
            For each store its slice of the batch and the indices of its real columns, None for all.

        Raises:
            SurgeryError: The batch, or the mask, does not fit what the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(*like)
        self._check_kind(*like)
        if batch != self.batch:
            raise SurgeryError(
                f"a batch of {batch} on a cache of {self.batch}: use batch_repeat_interleave, "
                "batch_select_indices or a new cache."
            )
        if mask is not None and mask.shape != (batch, self.slots + new):
            raise SurgeryError(
                f"attention mask {tuple(mask.shape)}: the cache holds {self.slots} columns and {new} "
                f"are new, so it must be {(batch, self.slots + new)}."
            )
        lengths, columns = [self.slots] * batch, [None] * batch
        if apart:
            self._separate()
        if self.recording:
            lengths = self.lengths  # the caller knows them, and room is there
        elif mask is not None:
            lengths, columns = columns_of(mask, self.slots)
            if any(c is not None for c in columns) or any(length != self.slots for length in lengths):
                self._separate()
        if self.keep and self.buffers is not None:
            self.buffers.maximum = self.maximum
            self.buffers.reserve(max(lengths) + new)
        for store, length in zip(self.stores, lengths, strict=False):
            self._expect(store, length, given=mask is not None)
        self.cropped = 0
        self.slots += new
        if len(self.stores) == 1:
            return [(self.stores[0], slice(None), columns[0])]
        return [(s, slice(b, b + 1), columns[b]) for b, s in enumerate(self.stores)]

    def _check_kind(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise SurgeryError for states of another model, dtype or device than those the cache holds."""
        if self.buffers is None or self.buffers.empty:
            return
        held = self.buffers.keys, self.buffers.values
        got = keys.shape[1], *_kind(keys, values)
        holds = len(held[0]) // self.batch, *_kind(*held)
        if got != holds:
            what = "{} KV heads of {} and {} channels, {} on {}"
            raise SurgeryError(
                f"the call brings {what.format(*got)}, but the paged cache holds {what.format(*holds)}. "
                "Start with a new cache after the model, its dtype, autocast or its device has changed."
            )

    def _expect(self, store: SequenceStore, length: int, *, given: bool) -> None:
        """Apply a pending crop: real tokens left in a cropped sequence are known from the mask alone.

        A mask that lacks more than was cropped hides others, which pages cannot leave out.
        """
        store.truncate(max(length, store.length - self.cropped))
        if store.length != length:
            raise SurgeryError(
                f"a sequence of {store.length} cached tokens, but "
                + (f"the attention mask counts {length}: " if given else "no attention mask was given: ")
                + "pass the same attention_mask, extended, in every call on one cache."
            )

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        each = self.batch // max(1, len(self.stores))
        return [store.length for store in self.stores for _ in range(each)]

    def device_lengths(self) -> torch.Tensor:
        """(batch,) int32 on the device: :attr:`lengths`. Whoever adds to it also calls :meth:`advance`."""
        lengths, held = self.lengths, self._device_lengths
        if held is None or len(held) != len(lengths) or not writable(held):
            held = self._device_lengths = torch.zeros(len(lengths), dtype=torch.int32, device=self.device)
            self._known_lengths = [0] * len(lengths)
        if self._known_lengths != lengths:
            if len(set(lengths)) == 1:
                held.fill_(lengths[0])
            else:
                held.copy_(torch.tensor(lengths, dtype=torch.int32))
            self._known_lengths = lengths
        return held

    def lay_out(self, router: PageRouter | None = None) -> None:
        """Bring all full chunks into tree order."""
        for store in self.stores:
            store.lay_out(router)

    def advance(self, new: int, router: PageRouter | None = None) -> None:
        """Count tokens that a decode step wrote."""
        for store in self.stores:
            store.length += new
            store.router = router
        self._known_lengths = self.lengths

    def _separate(self) -> None:
        if len(self.stores) < self.batch:
            self.stores = self._stores([(self.stores[0].length, self.stores[0].laid)] * self.batch)

    def _select(self, indices: torch.Tensor) -> None:
        if not self.is_initialized or self.buffers is None:
            return
        indices = indices.to(self.device)
        heads = torch.arange(self.kv_heads, device=self.device)
        self.buffers = self.buffers.select((indices[:, None] * self.kv_heads + heads).flatten())
        held = [(store.length, store.laid) for store in self.stores]
        self.batch = len(indices)
        self.stores = self._stores(held if len(held) == 1 else [held[i] for i in indices.tolist()])
        self._device_lengths = None

    def get_seq_length(self) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.slots, self.batch, self.stores, self.buffers = 0, 0, [], None
        self.is_initialized, self.cropped, self._device_lengths, self.calls = False, 0, None, {}

    def crop(self, tokens: int) -> None:
        """Remove ``-tokens`` columns; a positive number is the length to keep (older transformers)."""
        tokens = int(tokens)  # assisted generation of older transformers gives a tensor
        kept = max(0, self.slots + tokens) if tokens <= 0 else min(self.slots, tokens)
        self.cropped += self.slots - kept
        self.slots = kept

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self._select(indices)

    def offload(self) -> None:
        raise SurgeryError("the paged cache cannot be offloaded: leave cache_implementation unset.")


def _kind(keys: torch.Tensor, values: torch.Tensor) -> tuple[object, ...]:
    return keys.shape[-1], values.shape[-1], keys.dtype, keys.device
