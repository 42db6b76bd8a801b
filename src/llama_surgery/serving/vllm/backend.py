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
from llama_surgery.serving.order import BlockOrder
from llama_surgery.serving.paged import PagedStates, Scheduled, filled_blocks
from llama_surgery.serving.vllm import compat
from llama_surgery.serving.vllm.counters import report
from llama_surgery.serving.vllm.plain import PlainBackend
from llama_surgery.serving.vllm.steps import StepMetadata, Steps


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


def backend_for(layer: Any, *, alone: bool) -> type[AttentionBackend]:
    """The backend of an operated layer.

    Args:
        layer: The dense layer. The backend that the engine chose for it keeps keys and values, and computes
            all rows that see everything. Decode steps are in CUDA graphs where it supports them.
        alone: Leave nothing to the engine: decode steps read pages, and plain PyTorch executes them.

    Raises:
        UnsupportedModelError: It is not known how that backend lays out its cache.
    """
    dense = layer.attn_backend
    if alone or not compat.readable(dense, layer):
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
            if not isinstance(attn_metadata, SurgeryMetadata | StepMetadata):
                return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            if output_scale is not None or output_block_scale is not None:
                raise UnsupportedModelError("quantised attention output is not served.")
            surgery = layer.surgery
            if isinstance(attn_metadata, StepMetadata):
                return self._step(surgery, query, kv_cache, attn_metadata, output)
            batch, rows = attn_metadata.batch, attn_metadata.rows
            if rows is not None:
                # Before chunks are laid out: the engine masks by the place of a key in its block.
                parts = query[rows], key[rows], value[rows], kv_cache, attn_metadata.dense
                if isinstance(rows, slice):
                    super().forward(layer, *parts, output[rows])
                else:
                    output[rows] = super().forward(layer, *parts, torch.empty_like(output[: len(rows)]))
                surgery.counters.add_rows(batch.dense_rows, batch.config.tile)
            cache = self.surgery_states(surgery, kv_cache)
            given = {"scale": self.scale, "router": surgery.shard.router()}
            states = query, key, value, cache
            surgery.executor.attend(*states, batch, output, counters=surgery.counters, **given)
            if attn_metadata.whole is not None:
                quiet = LayerCounters(batch.config, self.num_kv_heads, quiet=True)
                surgery.executor.attend(*states, attn_metadata.whole, output, counters=quiet, **given)
            return output

        def _step(
            self, surgery: Any, query: torch.Tensor, kv_cache: torch.Tensor, step: StepMetadata,
            output: torch.Tensor,
        ) -> torch.Tensor:  # fmt: skip
            """One row of every sequence, in a graph or outside."""
            from llama_surgery.serving.paged_kernels import decode_rows

            rows = len(step.positions)
            output[:rows] = decode_rows(
                query[:rows],
                self.surgery_states(surgery, kv_cache),
                step.tables,
                step.positions,
                scale=self.scale,
                router=surgery.shard.router(),
                tally=surgery.counters.steady_tally(query.device),
                whole=step.whole,
            )
            return output

        def surgery_states(self, surgery: Any, kv_cache: torch.Tensor) -> PagedStates:
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
            layers = vllm_config.compilation_config.static_forward_context
            self.layers = [layers[name] for name in layer_names]
            self.operated = self.layers[0].surgery
            self.surgery = config = self.operated.executor.config
            # Parts of a batch, which are computed outside of graphs, must not use what graphs replay with.
            eager = (kv_cache_spec, layer_names, compat.without_graphs(vllm_config), device)
            self.beside = base.get_builder_cls()(*eager) if own else None
            self.order = BlockOrder(config.chunk_size, lambda: len(self.operated.side.kv_cache), device)
            self.steps: Steps | None = None
            if own and config.theta_decode:
                self.steps = Steps(config, compat.most_sequences(vllm_config), device)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            return compat.graph_support(super().get_cudagraph_support(vllm_config, kv_cache_spec))

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            """See the engine's builder."""
            common, config = common_attn_metadata, self.surgery
            lengths = compat.sequence_lengths(common)
            if own and common.max_query_len <= 1:
                self.order.note_steps(lengths, common.block_table_tensor)
                if self.steps is not None:
                    return self._step(common, lengths.tolist(), self.steps)
                return super().build(common_prefix_len, common, fast_build)
            if self.steps is not None:
                self.steps.interrupt()
            sequences = self._scheduled(common, lengths)
            tables = common.block_table_tensor[: len(sequences)]
            size = config.chunk_size
            filled = self.order.due(sequences, config) if own else filled_blocks(sequences, size)
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

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            """See the engine's builder, which may change what it built itself."""
            if self.steps is not None:
                return self.build(0, common_attn_metadata)
            return super().build_for_cudagraph_capture(common_attn_metadata)

        def _step(self, common: Any, lengths: list[int], steps: Steps) -> StepMetadata:
            """What every layer's kernels read in a step of single rows, chunks in tree order before it."""
            engine = self.operated.engine
            closed = steps.unread(lengths, engine.joined)
            if closed is not None and any(closed):
                tables = common.block_table_tensor
                earlier = torch.cat([tables[i, :count] for i, count in enumerate(closed) if count]).long()
                blocks = self.order.take(earlier)
                for layer in self.layers if len(blocks) else ():
                    states = layer.impl.surgery_states(layer.surgery, layer.kv_cache)
                    states.fill(blocks, layer.surgery.shard.router())
            report(engine)
            steps.count(lengths, engine)
            return steps.metadata(common, engine)

        def _scheduled(self, common: Any, lengths: torch.Tensor) -> list[Scheduled]:
            rows, tables = common.query_start_loc_cpu.tolist(), common.block_table_tensor.long()
            prefilling, size, found = common.is_prefilling.tolist(), self.surgery.chunk_size, []
            whole = self.operated.engine.dense if own else frozenset[int]()
            for index, stop in enumerate(lengths.tolist()):
                count = rows[index + 1] - rows[index]
                if count <= 0:  # what only pads the batch comes last
                    break
                blocks = tables[index, : -(-stop // size)]
                prompt, dense = prefilling[index] and index not in whole, index in whole
                found.append(Scheduled(stop - count, stop, rows[index], prompt, blocks, dense))
            return found

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
