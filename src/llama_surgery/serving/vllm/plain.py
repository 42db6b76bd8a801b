"""The backend where decode steps are sparse too: it keeps keys and values, and leaves all rows to others."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)


class PlainImpl(AttentionImpl):
    """Writes keys and values."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store (rows, kv_heads, head_dim) at ``slot_mapping`` (rows,).

        Padding, whose slots are negative, goes to block 0, which no sequence has.
        """
        rows, slots, size = len(slot_mapping), slot_mapping.clamp(min=0), kv_cache.shape[2]
        states = torch.cat((key[:rows], value[:rows]), -1).to(kv_cache.dtype)
        kv_cache[slots // size, :, slots % size] = states

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, *rest: Any
    ) -> torch.Tensor:
        """The engine measures memory."""
        return rest[1].zero_()


class PlainMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, *args: Any, **kwargs: Any) -> AttentionMetadata:
        """Nothing to build."""
        return AttentionMetadata()


class PlainBackend(AttentionBackend):
    """Keys and values in blocks (kv_heads, chunk_size, 2 * head_dim)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "PLAIN"

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """(blocks, kv_heads, block_size, 2 * head_size)."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_impl_cls() -> type[PlainImpl]:
        return PlainImpl

    @staticmethod
    def get_builder_cls() -> type[PlainMetadataBuilder]:
        return PlainMetadataBuilder
