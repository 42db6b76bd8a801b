"""What the operated layers of a server read, counted between two reports."""

import dataclasses
import time

import torch

from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.statistics import COUNTING, Counters, summarise
from llama_surgery.topology.geometry import closed_chunks, near_pairs, query_blocks, summary_pairs


@dataclasses.dataclass(frozen=True)
class RowCount:
    """Single rows of a batch, the same for every layer.

    Attributes:
        rows: How many.
        near_pairs: (query, key) pairs of their near fields, for one query head.
        causal_pairs: Pairs that dense attention would read.
        dense_rows: Rows for which no chunk is closed.
        summary_pairs: What summaries cost beside the near field's and the far pairs.
    """

    rows: int
    near_pairs: int
    causal_pairs: int
    dense_rows: int
    summary_pairs: float = 0.0

    @classmethod
    def of(cls, positions: list[int], config: SurgeryConfig) -> "RowCount":
        """Count the rows at ``positions``."""
        closed = [closed_chunks(position, config, 1) for position in positions]
        near = sum(near_pairs(position, position + 1, config, 1) for position in positions)
        causal = sum(positions) + len(positions)
        summaries = sum(summary_pairs(position, position + 1, config, 1) for position in positions)
        return cls(len(positions), near, causal, closed.count(0), summaries)

    def __add__(self, other: "RowCount") -> "RowCount":
        mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
        return RowCount(*(a + b for a, b in zip(mine, its, strict=True)))


class LayerCounters:
    """Counts of one layer since the last reset.

    Args:
        kv_heads: Of this rank.
        quiet: Count nothing: another tensor rank of this server reports.

    Attributes:
        by_tile: Counts for every tile size met.
        dense_rows: Rows that saw everything, since no chunk was closed for them.
    """

    def __init__(self, config: SurgeryConfig, kv_heads: int, *, quiet: bool = False) -> None:
        self.config, self.kv_heads, self.quiet = config, kv_heads, quiet
        self.resting = quiet  # another layer's turn, or another rank's
        self.by_tile: dict[int, Counters] = {}
        self.dense_rows = 0
        self._steady: torch.Tensor | None = None

    def reset(self) -> tuple[dict[int, Counters], int]:
        """Start anew. Returns what was counted: :attr:`by_tile` and :attr:`dense_rows`."""
        with COUNTING:
            counted = self.by_tile, self.dense_rows
            self.by_tile, self.dense_rows = {}, 0
        return counted

    def add_parts(self, parts: list[Part], result: AttentionResult) -> None:
        """Count one call of consecutive rows of a sequence, or of several, with one tile size."""
        if self.resting:
            return
        blocks = [
            block for part in parts for block in query_blocks(part.start, part.stop, self.config, part.tile)
        ]
        dense_rows = sum(block.stop - block.start for block in blocks if not block.closed)
        with COUNTING:
            self._of(parts[0].tile).add(result, self.kv_heads, self.config, *parts)
            self.dense_rows += dense_rows

    def add_rows(self, count: RowCount, tile: int = 1) -> None:
        """Count rows that have no far field, or whose pages are tallied."""
        if self.resting:
            return
        with COUNTING:
            self._of(tile).count(count.rows, count.near_pairs, count.causal_pairs, count.summary_pairs)
            self.dense_rows += count.dense_rows

    def tally(self, device: torch.device) -> torch.Tensor | None:
        """(2, kv_heads) int64, to which kernels add the pages that single rows opened and read."""
        if self.resting:
            return None
        return self._of(1).tally(self.kv_heads, self.config.page_size, device)

    def steady_tally(self, device: torch.device) -> torch.Tensor:
        """:meth:`tally` of steps that are captured in a graph: it stays where it is."""
        if self._steady is None:
            with torch.inference_mode(False):  # it may be read outside
                self._steady = torch.zeros(2, self.kv_heads, dtype=torch.int64, device=device)
        return self._steady

    def take_steps(self, count: RowCount) -> None:
        """Count rows of steps whose pages lie in :meth:`steady_tally`, which begins anew."""
        held = self._steady
        if held is None or self.quiet or not count.rows:
            return
        with COUNTING:
            self._of(1).tally(self.kv_heads, self.config.page_size, held.device).add_(held)
            held.zero_()
            self._of(1).count(count.rows, count.near_pairs, count.causal_pairs, count.summary_pairs)
            self.dense_rows += count.dense_rows

    def _of(self, tile: int) -> Counters:
        return self.by_tile.setdefault(tile, Counters())


class EngineCounters:
    """Counts of all layers of one engine: a process may hold several, and each speaks of its own.

    Attributes:
        dense: Places in the step's batch of requests that ask for dense attention.
        joined: How often requests have come into the batch.
    """

    def __init__(self) -> None:
        self.dense: frozenset[int] = frozenset()
        self.joined = 0
        self._layers: dict[int, LayerCounters] = {}
        self._told = time.monotonic()
        self._turn = -1
        self._steps = RowCount(0, 0, 0, 0)

    def next_turn(self) -> None:
        """A step begins. Layers take turns: one counts for all, since to count takes the host as long as to
        launch a layer's attention."""
        self._turn = (self._turn + 1) % len(self._layers)
        for place, layer in enumerate(self._layers.values()):
            layer.resting = layer.quiet or place != self._turn

    def register(self, index: int, counters: LayerCounters) -> None:
        """Let :meth:`take` speak of layer ``index`` too."""
        self._layers[index] = counters

    def add_steps(self, count: RowCount) -> None:
        """Count rows of a step that every layer computes in a graph."""
        self._steps += count

    def settle(self) -> None:
        """Let layers count what steps have read since the last time."""
        steps, self._steps = self._steps, RowCount(0, 0, 0, 0)
        for layer in self._layers.values():
            layer.take_steps(steps)

    def take(self, interval: float) -> str | None:
        """What was read since the last time, in a line, and start anew.

        Returns:
            None if nothing was counted, or the last time is less than ``interval`` seconds ago.
        """
        now = time.monotonic()
        if now - self._told < interval:
            return None
        self.settle()
        with COUNTING:
            counted = {index: layer for index, layer in self._layers.items() if layer.by_tile}
            if not counted:
                return None
            self._told = now
            taken = {index: layer.reset() for index, layer in counted.items()}
        page_size = next(iter(counted.values())).config.page_size
        read = summarise({index: by_tile for index, (by_tile, _) in taken.items()}, page_size)
        dense = sum(rows for _, rows in taken.values())
        return (
            f"rows {read.rows}, far density {read.far_density:.4f}, total density "
            f"{read.total_density:.4f}, pages read {read.pages_read}, dense fallbacks "
            f"{100 * dense / max(1, read.rows):.1f}% of rows (no closed chunk yet)"
        )
