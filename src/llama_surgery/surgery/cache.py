"""The paged cache: a transformers cache whose operated layers keep full chunks in tree order."""

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.store import SequenceStore


class PagedLayer(CacheLayerMixin):
    """Cache of one operated layer.

    Padding is never stored: every sequence holds its real tokens only, at their real positions. While
    all sequences have one length they share a store; they are kept apart from the first padding on.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: SurgeryConfig) -> None:
        super().__init__()
        self.config = config
        self.slots = 0  # columns seen, padding included: what transformers calls the length
        self.stores: list[SequenceStore] = []
        self.batch = 0
        self.kv_heads = 0
        self._expected = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch, self.kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = [SequenceStore(self.config)]
        self.is_initialized = True

    def expect(self) -> None:
        """Announce a call: an attention function of ours will take what the next update hands through."""
        self._expected = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new states through: the attention function, which knows the padding, stores them.

        Raises:
            UnsupportedModelError: The attention that called is not operated.
        """
        if not self._expected:
            raise UnsupportedModelError(
                "a paged cache, but the attention that fills it is not operated: after eject(model), start "
                "with a new cache. (On an operated model: this architecture hides its cache, not supported.)"
            )
        return key_states, value_states

    def take(
        self,
        mask: torch.Tensor | None,
        batch: int,
        new: int,
        like: tuple[torch.Tensor, torch.Tensor],
    ) -> list[tuple[SequenceStore, slice, torch.Tensor | None]]:
        """Stores that receive the next ``new`` columns, and the columns each receives.

        Args:
            mask: (batch, slots + new) bool, True for real tokens, or None if all are.
            batch: Sequences of the call.
            new: Columns of the call.
            like: New keys and values, for the first call.

        Returns:
            For each store its slice of the batch and the indices of its real columns, None for all.

        Raises:
            SurgeryError: The batch, or the mask, does not fit what the cache holds.
            UnsupportedModelError: The call was not announced.
        """
        if not self._expected:
            raise UnsupportedModelError(
                "an attention module calls its attention function twice for one update of the cache: "
                "not supported."
            )
        self._expected = False
        if not self.is_initialized:
            self.lazy_initialization(*like)
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
        if mask is None or bool(mask.all()):
            for store in self.stores:
                self._expect(store, self.slots)
            taken = self._by_sequence(None)
        else:
            self._separate()
            for store, length in zip(self.stores, mask[:, : self.slots].sum(1).tolist(), strict=True):
                self._expect(store, length)
            taken = self._by_sequence(mask[:, self.slots :])
        self.slots += new
        return taken

    def _by_sequence(
        self, real: torch.Tensor | None
    ) -> list[tuple[SequenceStore, slice, torch.Tensor | None]]:
        if real is None and len(self.stores) == 1:
            return [(self.stores[0], slice(None), None)]
        columns = [None if real is None else real[b].nonzero().squeeze(1) for b in range(self.batch)]
        return [(s, slice(b, b + 1), columns[b]) for b, s in enumerate(self.stores)]

    def _expect(self, store: SequenceStore, length: int) -> None:
        """Apply a pending crop: real tokens left in a cropped sequence are known from the mask alone."""
        store.truncate(length)
        if store.length != length:
            raise SurgeryError(
                f"a sequence of {store.length} cached tokens, but the attention mask counts {length}: "
                "pass the same attention_mask, extended, in every call on one cache."
            )

    def _separate(self) -> None:
        if len(self.stores) < self.batch:
            index = torch.arange(self.batch, device=self.device)
            self.stores = [self.stores[0].select(index[b : b + 1]) for b in range(self.batch)]

    def _select(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        if len(self.stores) == 1:
            self.stores = [self.stores[0].select(indices)]
        else:
            self.stores = [self.stores[i].fork() for i in indices.tolist()]
        self.batch = len(indices)

    def get_seq_length(self) -> int:
        return self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.slots, self.batch, self.stores = 0, 0, []
        self.is_initialized = False

    def crop(self, tokens: int) -> None:
        """Remove ``-tokens`` columns; a positive number is the length to keep (older transformers)."""
        tokens = int(tokens)  # assisted generation of older transformers gives a tensor
        self.slots = max(0, self.slots + tokens) if tokens <= 0 else min(self.slots, tokens)

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


class PagedCache(DynamicCache):
    """Cache of an operated model: operated layers paged, all others as transformers keeps them.

    ``generate()`` of an operated model builds one by itself.

    Args:
        config: The model's configuration.
        surgery: The operation's configuration.
        layers: Indices of the operated layers.
    """

    def __init__(self, config: PretrainedConfig, surgery: SurgeryConfig, layers: list[int]) -> None:
        super().__init__(config=config)
        self.surgery = surgery
        #: Calls of at most this many tokens on a non-empty cache are decode steps: tiles of one.
        self.decode_rows = 1
        #: Rows of a call's last tile, where the call leaves it incomplete, are decode steps. generate() asks
        #: for it: the end of a prompt decides the answer and deserves a row's own pages.
        self.settle_last_tile = False
        for index in layers:
            self.layers[index] = PagedLayer(surgery)
