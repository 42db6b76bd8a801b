"""What an operated layer of a server reads, counted between two reports."""

import dataclasses

import torch

from llama_surgery.attention.api import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.paged import Part
from llama_surgery.surgery.statistics import Counters
from llama_surgery.topology.geometry import closed_chunks, query_blocks


@dataclasses.dataclass(frozen=True)
class RowCount:
    """Single rows of a batch, the same for every layer.

    Attributes:
        rows: How many.
        near_pairs: (query, key) pairs of their near fields, for one query head.
        causal_pairs: Pairs that dense attention would read.
        dense_rows: Rows for which no chunk is closed.
    """

    rows: int
    near_pairs: int
    causal_pairs: int
    dense_rows: int

    @classmethod
    def of(cls, positions: list[int], config: SurgeryConfig) -> "RowCount":
        """Count the rows at ``positions``."""
        closed = [closed_chunks(position, config, 1) for position in positions]
        causal = sum(positions) + len(positions)
        return cls(len(positions), causal - sum(closed) * config.chunk_size, causal, closed.count(0))


class LayerCounters:
    """Counts of one layer since the last reset.

    Args:
        config: The topology.
        kv_heads: Of this rank.
        quiet: Count nothing: another tensor rank of this server reports.

    Attributes:
        by_tile: Counts for every tile size met.
        dense_rows: Rows that saw everything, since no chunk was closed for them.
    """

    def __init__(self, config: SurgeryConfig, kv_heads: int, *, quiet: bool = False) -> None:
        self.config, self.kv_heads, self.quiet = config, kv_heads, quiet
        self.reset()

    def reset(self) -> None:
        self.by_tile: dict[int, Counters] = {}
        self.dense_rows = 0

    def add_part(self, part: Part, result: AttentionResult) -> None:
        """Count one call of consecutive rows of one sequence."""
        if self.quiet:
            return
        first, last, tile = part
        self._of(tile).add(result, self.kv_heads, self.config.page_size)
        blocks = query_blocks(first, last, self.config, tile)
        self.dense_rows += sum(block.stop - block.start for block in blocks if not block.closed)

    def add_rows(self, count: RowCount) -> None:
        """Count single rows, whose pages are tallied."""
        if self.quiet:
            return
        self._of(1).count(count.rows, count.near_pairs, count.causal_pairs)
        self.dense_rows += count.dense_rows

    def tally(self, device: torch.device) -> torch.Tensor | None:
        """(2, kv_heads) int64, to which kernels add the pages that single rows opened and read."""
        return None if self.quiet else self._of(1).tally(self.kv_heads, self.config.page_size, device)

    def _of(self, tile: int) -> Counters:
        return self.by_tile.setdefault(tile, Counters())
