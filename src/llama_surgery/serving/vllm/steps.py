"""Decode steps that read pages, as the engine's CUDA graphs replay them: tensors that stay where they are."""

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadata

from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.counting import EngineCounters, RowCount
from llama_surgery.topology.geometry import closed_chunks


@dataclasses.dataclass
class StepMetadata(AttentionMetadata):
    """What layers get in a step in which every sequence has one row, and rows read pages.

    Attributes:
        tables: (sequences, chunks) int32, the engine's own: blocks of every chunk.
        positions: (sequences,) int32, of the rows; -1 for what only pads the batch.
        whole: (sequences,) int32, not 0 for requests that ask for dense attention.
    """

    tables: torch.Tensor
    positions: torch.Tensor
    whole: torch.Tensor


class Steps:
    """Writes the metadata of one step after the other into the same tensors.

    Args:
        config: The topology.
        sequences: Most sequences of a step, padding included.
        device: Where the caches are.
    """

    def __init__(self, config: SurgeryConfig, sequences: int, device: torch.device) -> None:
        self._config = config
        self._positions = torch.full((sequences,), -1, dtype=torch.int32, device=device)
        self._whole = torch.zeros_like(self._positions)
        self._dense: frozenset[int] = frozenset()
        self._lengths: list[int] = []
        self._joined = -1

    def interrupt(self) -> None:
        """A step of another kind begins: sequences may come and go in it."""
        self._lengths = []

    def unread(self, lengths: list[int], joined: int) -> list[int] | None:
        """Closed chunks of every sequence, if some may not be in tree order yet, and else None.

        A chunk is laid out in the first step that has it in its far field, ``window`` tokens after the one
        that filled it. Which chunks are is known from the lengths while the same sequences go on.

        Args:
            lengths: Tokens of every sequence after the step; 0 for what only pads the batch.
            joined: How often requests have come so far.
        """
        before, self._lengths = self._lengths, lengths
        last, self._joined = self._joined, joined
        closed = [self._closed(length) for length in lengths]
        same = (
            last == joined
            and len(before) == len(lengths)
            and all(now == then + (now > 0) for now, then in zip(lengths, before, strict=True))
        )
        return None if same and closed == [self._closed(length) for length in before] else closed

    def _closed(self, length: int) -> int:
        return closed_chunks(length - 1, self._config, 1) if length else 0

    def metadata(self, common: Any, engine: EngineCounters) -> StepMetadata:
        """Of a step with the engine's description ``common``; nothing is asked of the device."""
        count = common.num_reqs
        torch.sub(common.seq_lens[:count], 1, out=self._positions[:count])
        if engine.dense != self._dense:
            self._dense = engine.dense
            places = [int(place in self._dense) for place in range(len(self._whole))]
            self._whole.copy_(torch.tensor(places, dtype=torch.int32), non_blocking=True)
        tables = common.block_table_tensor[:count]
        return StepMetadata(tables, self._positions[:count], self._whole[:count])

    def count(self, lengths: list[int], engine: EngineCounters) -> None:
        """Count the rows of a step that follow the topology; their pages are tallied as they are read."""
        rows = [n - 1 for place, n in enumerate(lengths) if n and place not in engine.dense]
        engine.add_steps(RowCount.of(rows, self._config))
