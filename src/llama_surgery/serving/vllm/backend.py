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
from llama_surgery.serving.execution import Batch
from llama_surgery.serving.families import read_block
from llama_surgery.serving.paged import Scheduled
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
    """What the engine hands to every layer.

    Attributes:
        batch: The scheduled batch.
    """

    batch: Batch


class SurgeryMetadataBuilder(AttentionMetadataBuilder[SurgeryMetadata]):
    """Sequences and their blocks, out of the engine's description of a step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config, _ = read_block(vllm_config.model_config.hf_config.surgery)
        layers = vllm_config.compilation_config.static_forward_context
        self.engine = layers[layer_names[0]].surgery.engine

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SurgeryMetadata:
        """See the engine's builder."""
        common, size = common_attn_metadata, self.config.chunk_size
        rows, tables = common.query_start_loc_cpu.tolist(), common.block_table_tensor
        prefilling = common.is_prefilling.tolist()
        sequences = []
        # Rows of the batch that only pad it come last, with no tokens.
        for index, stop in enumerate(compat.sequence_lengths(common)):
            count = rows[index + 1] - rows[index]
            if count <= 0:
                break
            blocks = tables[index, : -(-stop // size)].long()
            sequences.append(Scheduled(stop - count, stop, rows[index], prefilling[index], blocks))
        report(self.engine)
        slots = common.slot_mapping[: rows[len(sequences)]].long()
        return SurgeryMetadata(Batch(sequences, tables[: len(sequences)], slots, self.config))


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
            layer: The operated attention layer; ``layer.surgery`` is its :class:`LayerSurgery`.
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
        batch, router = attn_metadata.batch, surgery.shard.router()
        cache = surgery.executor.states(kv_cache, surgery.side.kv_cache.flatten(2))
        rows = len(batch.slots)
        # All keys first: a sequence may share a block that another one fills in this very step.
        cache.write(key[:rows], value[:rows], batch.slots)
        cache.fill(batch.filled, router)
        surgery.executor.attend(
            query[:rows],
            cache,
            batch,
            output[:rows],
            scale=self.scale,
            router=router,
            counters=surgery.counters,
        )
        return output
