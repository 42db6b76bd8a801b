"""Attention backends: one of the engine's own, for all rows that see everything, with the rest beside it."""

import dataclasses
import functools
from itertools import accumulate
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.serving.counting import LayerCounters
from llama_surgery.serving.execution import Batch, warm_up
from llama_surgery.serving.families import read_block
from llama_surgery.serving.paged import PagedStates, Scheduled, filled_blocks
from llama_surgery.serving.vllm import compat
from llama_surgery.serving.vllm.counters import report
from llama_surgery.serving.vllm.plain import PlainBackend


@dataclasses.dataclass
class SurgeryMetadata(AttentionMetadata):
    """What layers get in a step that the engine's own attention cannot compute alone.

    Attributes:
        batch: The scheduled batch, and what of it is computed here.
        whole: Of requests that ask for dense attention, where the engine's own computes none of their rows.
        rows: The rows that the engine's own attention computes: (n,) int64, or a slice.
        dense: Its metadata for them; None where there are none.
    """

    batch: Batch
    rows: torch.Tensor | slice | None = None
    dense: Any = None
    whole: Batch | None = None


def backend_for(layer: Any, *, dense_decode: bool) -> type[AttentionBackend]:
    """The backend of an operated layer.

    Args:
        layer: The dense layer. The backend that the engine chose for it keeps keys and values, and computes
            all rows that see everything: decode steps among them, in CUDA graphs where it supports them.
        dense_decode: Do decode steps see everything? If not, nothing is left to the engine.

    Raises:
        UnsupportedModelError: It is not known how that backend lays out its cache.
    """
    dense = layer.attn_backend
    if not dense_decode or not compat.readable(dense, layer):
        return _operated(PlainBackend)
    if dense.get_name() not in compat.KNOWN_BACKENDS:
        raise UnsupportedModelError(
            f"attention backend {dense.get_name()}: operated models are served on "
            f"{', '.join(compat.KNOWN_BACKENDS)}. Use --attention-backend with one of them."
        )
    return _operated(dense)


@functools.cache
def _operated(base: type[AttentionBackend]) -> type[AttentionBackend]:
    own = base is not PlainBackend

    class SurgeryImpl(base.get_impl_cls()):  # type: ignore[misc]
        """The engine's own, if all rows see everything; else that for those which do, then the others."""

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """Arguments are the engine's; ``layer.surgery`` is the layer's :class:`LayerSurgery`."""
            scales = output_scale, output_block_scale
            if attn_metadata is None:  # memory is being measured
                warm_up(layer.surgery.executor, self.num_heads, self.num_kv_heads, query.device)
            if not isinstance(attn_metadata, SurgeryMetadata):
                return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            if output_scale is not None or output_block_scale is not None:
                raise UnsupportedModelError("quantised attention output is not served.")
            surgery, batch, rows = layer.surgery, attn_metadata.batch, attn_metadata.rows
            if rows is not None:
                # Before chunks are laid out: the engine masks by the place of a key in its block.
                parts = query[rows], key[rows], value[rows], kv_cache, attn_metadata.dense
                if isinstance(rows, slice):
                    super().forward(layer, *parts, output[rows])
                else:
                    output[rows] = super().forward(layer, *parts, torch.empty_like(output[: len(rows)]))
                surgery.counters.add_rows(batch.dense_rows, batch.config.tile)
            cache = self._caches(surgery, kv_cache)
            given = {"scale": self.scale, "router": surgery.shard.router()}
            states = query, key, value, cache
            surgery.executor.attend(*states, batch, output, counters=surgery.counters, **given)
            if attn_metadata.whole is not None:
                quiet = LayerCounters(batch.config, self.num_kv_heads, quiet=True)
                surgery.executor.attend(*states, attn_metadata.whole, output, counters=quiet, **given)
            return output

        def _caches(self, surgery: Any, kv_cache: torch.Tensor) -> PagedStates:
            """The layer's caches, put together once for as long as they stay in place."""
            side = surgery.side.kv_cache
            place = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (kv_cache, side)]
            if self.__dict__.get("surgery_place") != place:
                states = compat.keys_and_values(base.get_name(), kv_cache)
                self.surgery_caches = surgery.executor.states(*states, side.flatten(2))
                self.surgery_place = place
            return self.surgery_caches

    class SurgeryMetadataBuilder(base.get_builder_cls()):  # type: ignore[misc]
        """The engine's own metadata, unless rows of the step do not see everything."""

        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self.surgery, _ = read_block(vllm_config.model_config.hf_config.surgery)
            layers = vllm_config.compilation_config.static_forward_context
            self.operated = layers[layer_names[0]].surgery
            # Parts of a batch, which are computed outside of graphs, must not use what graphs replay with.
            eager = (kv_cache_spec, layer_names, compat.without_graphs(vllm_config), device)
            self.beside = base.get_builder_cls()(*eager) if own else None
            self.unsorted: torch.Tensor | None = None  # (blocks,) bool: full, in order of position

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            return compat.graph_support(super().get_cudagraph_support(vllm_config, kv_cache_spec))

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            """See the engine's builder."""
            common, config = common_attn_metadata, self.surgery
            lengths = compat.sequence_lengths(common)
            if own and (common.max_query_len <= 1 or not config.theta):
                self._note_decoded(common, lengths)
                return super().build(common_prefix_len, common, fast_build)
            sequences = self._scheduled(common, lengths)
            tables = common.block_table_tensor[: len(sequences)]
            filled = self._to_lay_out(sequences)
            if own and not any(s.sparse(config) for s in sequences):
                return super().build(common_prefix_len, common, fast_build)
            self.operated.engine.next_turn()
            report(self.operated.engine)
            batch = Batch(sequences, tables, config, filled, dense=own)
            if own:
                return SurgeryMetadata(batch, *self._dense(common, sequences))
            asked = self.operated.engine.dense
            if not asked:
                return SurgeryMetadata(batch)
            everything = dataclasses.replace(config, theta=0.0, theta_decode=0.0)
            whole = batch.some(lambda place: place in asked, everything)
            return SurgeryMetadata(batch.some(lambda place: place not in asked, config), whole=whole)

        def _scheduled(self, common: Any, lengths: torch.Tensor) -> list[Scheduled]:
            rows, tables = common.query_start_loc_cpu.tolist(), common.block_table_tensor.long()
            prefilling, size, found = common.is_prefilling.tolist(), self.surgery.chunk_size, []
            if own:  # rows that no prompt has see everything
                prefilling = [p and i not in self.operated.engine.dense for i, p in enumerate(prefilling)]
            for index, stop in enumerate(lengths.tolist()):
                count = rows[index + 1] - rows[index]
                if count <= 0:  # what only pads the batch comes last
                    break
                blocks = tables[index, : -(-stop // size)]
                found.append(Scheduled(stop - count, stop, rows[index], prefilling[index], blocks))
            return found

        def _note_decoded(self, common: Any, lengths: torch.Tensor) -> None:
            """Remember chunks that decode steps fill. They are laid out when somebody reads them sparsely."""
            size = self.surgery.chunk_size
            full = ((lengths > 0) & (lengths % size == 0)).nonzero()[:, 0]
            if len(full) and self.surgery.theta:
                chunks = (lengths[full] // size - 1).to(self.device, non_blocking=True)
                rows = full.to(self.device, non_blocking=True)
                self._mark(common.block_table_tensor[rows, chunks].long(), unsorted=True)

        def _mark(self, blocks: torch.Tensor, *, unsorted: bool) -> None:
            if self.unsorted is None:
                count = self.operated.side.kv_cache.shape[0]
                self.unsorted = torch.zeros(count, dtype=torch.bool, device=self.device)
            self.unsorted.index_fill_(0, blocks, unsorted)

        def _to_lay_out(self, sequences: list[Scheduled]) -> torch.Tensor:
            """(n,) int64: blocks that are read sparsely in this step and are not in tree order yet."""
            config, size = self.surgery, self.surgery.chunk_size
            if not own:
                return filled_blocks(sequences, size)
            first = [min(s.start // size, s.far_chunks(config)) for s in sequences]
            now = [s.blocks[s.start // size : s.far_chunks(config)] for s in sequences]
            later = [s.blocks[max(s.start // size, s.far_chunks(config)) : s.stop // size] for s in sequences]
            self._mark(torch.cat(later), unsorted=True)
            self._mark(torch.cat(now), unsorted=False)
            if not any(first):
                return torch.cat(now)
            earlier = torch.cat([s.blocks[:count] for s, count in zip(sequences, first, strict=True)])
            read = torch.zeros_like(self.unsorted).index_fill_(0, earlier, True)  # type: ignore[arg-type]
            left = (read & self.unsorted).nonzero()[:, 0]  # waits for the device
            self._mark(left, unsorted=False)
            return torch.cat((*now, left))

        def _dense(self, common: Any, sequences: list[Scheduled]) -> tuple[torch.Tensor | slice | None, Any]:
            """Rows that see everything, and the engine's metadata for them alone."""
            runs = [(i, s, *run) for i, s in enumerate(sequences) for run in s.dense(self.surgery)]
            if not runs:
                return None, None
            ends, counts = [stop for *_, stop in runs], [stop - start for *_, start, stop in runs]
            first = [s.row + start - s.start for _, s, start, _ in runs]
            rows: torch.Tensor | slice = slice(first[0], first[-1] + counts[-1])
            if rows.stop - rows.start > sum(counts):
                rows = torch.cat([torch.arange(a, a + n) for a, n in zip(first, counts, strict=True)])
                rows = rows.to(self.device, non_blocking=True)
            where = torch.tensor([index for index, *_ in runs]).to(self.device, non_blocking=True)
            starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
            lengths = torch.tensor(ends, dtype=torch.int32)
            part = compat.part_of(common, starts, lengths, where, rows)
            return rows, self.beside.build(0, part)

    class SurgeryBackend(base):  # type: ignore[misc, valid-type]
        """Attention through the exported topology."""

        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> type:
            return SurgeryImpl

        @staticmethod
        def get_builder_cls() -> type:
            return SurgeryMetadataBuilder

    return SurgeryBackend


class SideBackend(PlainBackend):
    """For side caches, which attend to nothing: their layer's own backend reads and writes them."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *_: Any, **__: Any
    ) -> tuple[int, ...]:
        """(blocks, kv_heads, 1, head_size): asked for by vLLM 0.26 alone."""
        return num_blocks, num_kv_heads, 1, head_size

    @staticmethod
    def get_builder_cls() -> type["SideMetadataBuilder"]:
        return SideMetadataBuilder


class SideMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Nothing to build, in graphs or outside."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        return compat.graph_support()

    def build(self, *args: Any, **kwargs: Any) -> AttentionMetadata:
        """Nothing."""
        return AttentionMetadata()
