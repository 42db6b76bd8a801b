"""Attention backend, metadata and implementation."""

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.serving.paged import PagedStates, Scheduled, attend_paged, filled_blocks
from llama_surgery.serving.vllm import compat
from llama_surgery.serving.vllm.counters import report


class SurgeryBackend(AttentionBackend):
    """Attention through the exported topology."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SurgeryImpl"]:
        return SurgeryImpl

    @staticmethod
    def get_builder_cls() -> type["SurgeryMetadataBuilder"]:
        return SurgeryMetadataBuilder


@dataclasses.dataclass
class SurgeryMetadata(AttentionMetadata):
    """A scheduled batch: prompts' pieces and decode steps mixed, as they come.

    Attributes:
        batch: Its sequences.
        slots: (rows,) int64: where every row's key and value go, -1 for padding.
        filled: (n,) int64: blocks whose chunks become full.
    """

    batch: list[Scheduled]
    slots: torch.Tensor
    filled: torch.Tensor


class SurgeryMetadataBuilder(AttentionMetadataBuilder[SurgeryMetadata]):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.chunk_size = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SurgeryMetadata:
        """See the engine's builder."""
        common = common_attn_metadata
        rows = common.query_start_loc_cpu.tolist()
        prefilling = common.is_prefilling.tolist()
        batch = []
        for index, stop in enumerate(compat.sequence_lengths(common)):
            count = rows[index + 1] - rows[index]
            if count <= 0:  # padding
                continue
            chunks = -(-stop // self.chunk_size)
            blocks = common.block_table_tensor[index, :chunks].long()
            batch.append(Scheduled(stop - count, stop, rows[index], prefilling[index], blocks))
        report()
        return SurgeryMetadata(
            batch, common.slot_mapping[: rows[-1]].long(), filled_blocks(batch, self.chunk_size)
        )


class SideBackend(SurgeryBackend):
    """For side caches, which attend to nothing: their layer's own backend reads and writes them."""

    @staticmethod
    def get_builder_cls() -> type["SideMetadataBuilder"]:
        return SideMetadataBuilder


class SideMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, *args: Any, **kwargs: Any) -> AttentionMetadata:
        """Nothing to build."""
        return AttentionMetadata()


class SurgeryImpl(AttentionImpl):
    """Writes a batch's keys and values, lays out the chunks they fill, then attends."""

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
        if alibi_slopes or sliding_window or logits_soft_cap or kv_sharing_target_layer_name:
            raise UnsupportedModelError(
                "ALiBi, sliding windows, capped logits and keys shared between layers are not served."
            )
        if attn_type != AttentionType.DECODER:
            raise UnsupportedModelError(f"attention of type {attn_type}: only decoders are served.")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SurgeryMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            layer: The operated attention layer, with its side cache, corrections and counters.
            query: (rows, heads, head_dim); ``output`` alike.
            key: (rows, kv_heads, head_dim); ``value`` alike.
            kv_cache: (blocks, kv_heads, chunk_size, 2 * head_dim).
            attn_metadata: The batch; None while the engine measures memory.
            output: Written and returned.
            output_scale: Not supported: output is not quantised.
            output_block_scale: Not supported either.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedModelError("quantised attention output is not served.")
        if attn_metadata is None:
            return output.zero_()
        surgery = layer.surgery
        router = surgery.shard.router()
        cache = PagedStates(kv_cache, surgery.side.kv_cache.flatten(2), surgery.config)
        rows = len(attn_metadata.slots)
        # All keys first: a sequence may share a block that another one fills in this very step.
        cache.write(key[:rows], value[:rows], attn_metadata.slots)
        cache.fill(attn_metadata.filled, router)
        for sequence in attn_metadata.batch:
            for part in sequence.parts(surgery.config.tile):
                where = slice(
                    sequence.row + part[0] - sequence.start, sequence.row + part[1] - sequence.start
                )
                heads = query[where].unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3)
                result = attend_paged(
                    heads, cache, sequence.blocks, part, sequence.stop, scale=self.scale, router=router
                )
                output[where] = result.out.permute(2, 0, 1, 3).flatten(1, 2)
                surgery.counters.add(part[2], result, self.num_kv_heads)
        return output
