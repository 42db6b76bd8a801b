"""What operated layers really read, counted where it is read."""

import collections
import dataclasses
import functools
import threading
from typing import Any, NamedTuple

import torch

from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.written import writable
from llama_surgery.topology.geometry import causal_pairs, near_pairs, query_blocks, summary_pairs

#: Held while counts are changed, by whatever thread: for additions alone, on the host. One for all counters,
#: since they are copied and pickled with a model, and a lock cannot be.
COUNTING = threading.RLock()


class Counters:
    """Running counts of one layer at one tile size, per KV head, kept on the device.

    Near and causal pairs are those of one query head; far pairs and pages are added up over the sets of pages
    that a KV head has, :attr:`choosers`: one for all its query heads in tiles of one row, else one for each.
    Counts of threads that call one model add up exactly, where their work is enqueued on one stream of a GPU.
    """

    def __init__(self) -> None:
        self.choosers = 1
        self.rows = 0
        self.near_pairs = 0
        self.causal_pairs = 0
        self.summary_pairs = 0.0
        #: (3, kv_heads) int64: far pairs, those that rows saw, and pages.
        self._read: torch.Tensor | None = None
        #: {KV heads: (pairs, pages)} of each, read by rows that saw everything.
        self.whole: dict[int, tuple[int, int]] = {}
        self._tally: torch.Tensor | None = None  # (2, kv_heads) int64, pages opened and read
        self._page_size = 0

    def tally(self, kv_heads: int, page_size: int, device: torch.device) -> torch.Tensor:
        """(2, kv_heads) int64, to which kernels add the pages that single rows opened and read."""
        with COUNTING:
            held = self._tally
            if held is not None and (self._page_size, held.device) != (page_size, device):
                opened, read = held
                self._add(torch.stack((read * self._page_size, opened * self._page_size, read)))
                held = None
            if held is None:
                held = torch.zeros(2, kv_heads, dtype=torch.int64, device=device)
            elif not writable(held):
                held = held.clone()
            self._tally, self._page_size = held, page_size
            return held

    def count_rows(self, start: int, stop: int, config: SurgeryConfig, tile: int, sequences: int = 1) -> None:
        """Count rows ``start … stop - 1`` of sequences, and their pairs but for those of pages."""
        self.count(*(count * sequences for count in _whole(Part(start, stop, tile), config)[:4]))

    def count(self, rows: int, near_pairs: int, causal_pairs: int, summary_pairs: float = 0.0) -> None:
        """Count rows of all sequences, and their pairs, whose pages are tallied."""
        with COUNTING:
            self.rows += rows
            self.near_pairs += near_pairs
            self.causal_pairs += causal_pairs
            self.summary_pairs += summary_pairs

    def count_far(self, read: torch.Tensor, seen: torch.Tensor) -> None:
        """Count far pairs (heads,) int64 that were read, and that rows saw, where there are no pages."""
        with COUNTING:
            self._add(torch.stack((read, seen, torch.zeros_like(read))))

    def totals(self, name: str) -> list[int]:
        """``far_pairs``, ``visible_pairs`` or ``pages`` of every KV head, over all its choosers; empty before
        the first call."""
        place = ("far_pairs", "visible_pairs", "pages").index(name)
        parts = [] if self._read is None else [self._read[place].tolist()]
        if self._tally is not None:
            opened, read = self._tally.tolist()
            pages = opened if name == "visible_pairs" else read
            parts.append([n * (1 if name == "pages" else self._page_size) for n in pages])
        parts += [[counts[name == "pages"]] * kv_heads for kv_heads, counts in self.whole.items()]
        return [sum(column) for column in zip(*parts, strict=True)]

    def add(self, result: AttentionResult, kv_heads: int, config: SurgeryConfig, *parts: Part) -> None:
        """Count one call: ``result`` of the rows ``parts`` of (sequences * kv_heads) streams."""
        streams, page_size = len(result.out), config.page_size
        sequences = streams // kv_heads
        read = [
            torch.stack((p.executed_pairs(page_size), p.visible_pairs(page_size), p.counts.sum(1)))
            .view(3, sequences, kv_heads, -1)
            .sum((1, 3))
            for p in result.plans
        ]
        with COUNTING:
            self.choosers = max([self.choosers, *(len(p.counts) // streams for p in result.plans)])
            for part in parts:
                self.count_rows(part.start, part.stop, config, part.tile, sequences)
            for counts in read or [torch.zeros(3, kv_heads, dtype=torch.int64, device=result.out.device)]:
                self._add(counts)

    def add_whole(self, read: "Counted") -> None:
        """Count rows that saw everything."""
        with COUNTING:
            self.choosers = max(self.choosers, read.choosers)
            self.count(*read.counts)
            pairs, pages = self.whole.get(read.kv_heads, (0, 0))
            self.whole[read.kv_heads] = pairs + read.pairs, pages + read.pages

    def _add(self, counts: torch.Tensor) -> None:
        """Add (3, kv_heads) int64, on their device: the model may have moved."""
        total = self._read
        self._read = counts if total is None else total.to(counts.device) + counts


class Counted(NamedTuple):
    """What rows that saw everything have read in a layer, the pages of their closed chunks all opened.

    Attributes:
        tile: Queries of a tile.
        kv_heads: KV heads.
        choosers: Sets of pages that a KV head has.
        counts: Arguments of :meth:`Counters.count`.
        pairs: Far pairs of a KV head.
        pages: Far pages of a KV head.
    """

    tile: int
    kv_heads: int
    choosers: int
    counts: tuple[int, int, int, float]
    pairs: int
    pages: int


def count_whole(part: Part, config: SurgeryConfig, sequences: int, kv_heads: int, heads: int) -> Counted:
    """Count rows ``part`` of sequences that saw everything."""
    choosers = 1 if part.tile == 1 else heads // kv_heads
    *counts, pairs, pages = _whole(part, config)
    each, all_counts = sequences * choosers, tuple(count * sequences for count in counts)
    return Counted(part.tile, kv_heads, choosers, all_counts, pairs * each, pages * each)


@functools.lru_cache(maxsize=256)  # every layer of a model asks the same
def _whole(part: Part, config: SurgeryConfig) -> tuple[int, int, int, float, int, int]:
    """Rows, near, causal and summary pairs of a part; pairs and pages of its far field, if it reads all."""
    start, stop, tile = part
    causal, near = causal_pairs(start, stop), near_pairs(start, stop, config, tile)
    blocks = query_blocks(start, stop, config, tile)
    tiles = sum(b.closed * (-(-b.stop // tile) - b.start // tile) for b in blocks)
    summary = summary_pairs(start, stop, config, tile)
    return stop - start, near, causal, summary, causal - near, tiles * config.pages_per_chunk


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Densities over all that an operated model computed since the last reset.

    Densities share one denominator, the causal pairs: ``total = near + far + summary``. *Executed* pairs are
    what tiles read, *visible* pairs what rows may see of it, both means over query heads.

    Attributes:
        near_density: Near-field pairs over causal pairs.
        far_density: Executed far pairs over causal pairs.
        visible_far_density: Visible far pairs over causal pairs.
        summary_density: What mean values of pages cost at most, in the same unit: half a pair for every page.
        total_density: Near, executed far and summaries together.
        pages_read: Far pages read, over all layers, query heads and tiles; in decode steps over KV heads,
            whose query heads read together.
        rows: Query rows, over all layers.
        causal_pairs: Over all layers and KV heads.
        by_layer: Per layer ``far_density`` and ``pages_read`` (lists over KV heads), ``near_density``,
            ``summary_density``.
        by_tile: Per tile size (as text: "1" for decode) ``far_density``, ``total_density``, ``rows`` and
            ``pages_per_tile_row``, the mean number of far pages a row's tile reads for a head.
    """

    near_density: float
    far_density: float
    visible_far_density: float
    summary_density: float
    total_density: float
    pages_read: int
    rows: int
    causal_pairs: int
    by_layer: dict[int, dict[str, Any]]
    by_tile: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, ready for JSON."""
        return dataclasses.asdict(self)


def summarise(layers: dict[int, dict[int, Counters]], page_size: int) -> Statistics:
    """Statistics of layers' counters, given as {layer: {tile: counters}}."""
    by_layer = {}
    for index, tiles in layers.items():
        sums = _sums(list(tiles.values()))
        causal = max(1, sums["causal"])
        by_layer[index] = {
            "far_density": [pairs / causal for pairs in sums["far"]],
            "pages_read": sums["pages"],
            "near_density": sums["near"] / causal,
            "summary_density": sums["summary"] / causal,
        }
    by_tile = {}
    for tile in sorted({tile for tiles in layers.values() for tile in tiles}):
        part = _total([tiles[tile] for tiles in layers.values() if tile in tiles])
        by_tile[str(tile)] = {name: part[name] for name in ("far_density", "total_density", "rows")}
        by_tile[str(tile)]["pages_per_tile_row"] = part["far_pairs_per_row"] / page_size
    total = _total([counters for tiles in layers.values() for counters in tiles.values()])
    del total["far_pairs_per_row"]
    return Statistics(**total, by_layer=by_layer, by_tile=by_tile)


def _sums(counters: list[Counters]) -> dict[str, Any]:
    """Sums over counters of one layer, lists over KV heads; pairs are means over their query heads."""

    def heads(name: str) -> list[Any]:
        rows = [(c, totals) for c in counters if (totals := c.totals(name))]
        if name != "pages":
            rows = [(c, [pairs / c.choosers for pairs in totals]) for c, totals in rows]
        return [sum(column) for column in zip(*(totals for _, totals in rows), strict=True)]

    return {
        "near": sum(c.near_pairs for c in counters),
        "causal": sum(c.causal_pairs for c in counters),
        "summary": sum(c.summary_pairs for c in counters),
        "rows": sum(c.rows for c in counters),
        "far": heads("far_pairs"),
        "visible": heads("visible_pairs"),
        "pages": heads("pages"),
    }


def _total(counters: list[Counters]) -> dict[str, Any]:
    """What :class:`Statistics` says of several layers together, and far pairs of a row's tile."""
    total = collections.Counter[str]()
    for counter in counters:
        sums = _sums([counter])
        heads = max(1, len(sums["far"]))
        total.update({name: sums[name] * heads for name in ("near", "causal", "summary")})
        total.update({name: sum(sums[name]) for name in ("far", "visible", "pages")})
        total.update(rows=sums["rows"], head_rows=sums["rows"] * heads)
    densities = {
        name: total[name] / max(1, total["causal"]) for name in ("near", "far", "visible", "summary")
    }
    return {
        "near_density": densities["near"],
        "far_density": densities["far"],
        "visible_far_density": densities["visible"],
        "summary_density": densities["summary"],
        "total_density": densities["near"] + densities["far"] + densities["summary"],
        "pages_read": int(total["pages"]),
        "rows": total["rows"],
        "causal_pairs": total["causal"],
        "far_pairs_per_row": total["far"] / max(1, total["head_rows"]),
    }
