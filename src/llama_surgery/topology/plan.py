"""The plan: for every tile, the far pages it reads and the first row that opened each."""

import dataclasses

import torch

from llama_surgery.topology.geometry import Block


@dataclasses.dataclass(frozen=True)
class Plan:
    """Far pages of one block of rows. Nothing else of the far field is read.

    A *chooser* has pages of its own: every query head in tiles of several rows, all heads of a KV head
    together in tiles of one. Choosers of one stream are neighbours.

    Attributes:
        block: The rows the plan is for.
        tile: Queries of a tile; tiles are anchored at multiples of it, so the first and the last tile
            of a block may be partial.
        pages: (choosers, tiles, most) int64, ascending, left-packed, -1 padded.
        first_open: (choosers, tiles, most) int64: the first row of the tile, counted from the tile's
            anchor, that opened the page; only rows from it on see the page. ``tile`` where padded.
        counts: (choosers, tiles) int64, pages of each tile.
        everything: Every closed page is open to every row.
    """

    block: Block
    tile: int
    pages: torch.Tensor
    first_open: torch.Tensor
    counts: torch.Tensor
    everything: bool = False

    @property
    def lead(self) -> int:
        """Rows of the first tile that lie before the block."""
        return self.block.start % self.tile

    @property
    def tiles(self) -> int:
        return tiles_of(self.block, self.tile)

    def rows_per_tile(self) -> torch.Tensor:
        """(tiles,) int64: rows of every tile that lie in the block."""
        row = torch.arange(self.block.start, self.block.stop)
        return torch.bincount(row // self.tile - self.block.start // self.tile)

    def executed_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,) int64: (query, key) pairs the far pass reads for one query head."""
        rows = self.rows_per_tile().to(self.counts.device)
        return (self.counts * rows).sum(1) * page_size

    def visible_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,) int64: pairs that the rows may see, first-open rows respected."""
        rows = self.rows_per_tile().to(self.counts.device)
        first = torch.zeros_like(rows)
        first[0] = self.lead
        seen = (first + rows)[:, None] - torch.maximum(self.first_open, first[:, None])
        return seen.clamp_min(0).sum((1, 2)) * page_size


def tiles_of(block: Block, tile: int) -> int:
    """Tiles, partial ones included, that the rows of ``block`` touch."""
    return (block.stop - 1) // tile - block.start // tile + 1


def plan_from_first_open(first_open: torch.Tensor, block: Block, tile: int) -> Plan:
    """List the opened pages of (choosers, tiles, pages) int64, ``tile`` where no row opened the page."""
    opened = first_open < tile
    counts = opened.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    pages = (~opened).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
    first = first_open.gather(-1, pages)
    return Plan(block, tile, pages.where(first < tile, -1), first, counts)


def plan_of_everything(block: Block, tile: int, pages: int, sink_pages: torch.Tensor) -> Plan:
    """All ``pages`` closed pages, opened by every tile's first row; ``sink_pages`` (choosers,) need none."""
    tiles, choosers = tiles_of(block, tile), len(sink_pages)
    listed = torch.arange(pages, device=sink_pages.device).expand(choosers, tiles, pages)
    counts = listed.new_full((choosers, tiles), pages)
    first_open = torch.zeros_like(listed)
    first_open[:, 0] = block.start % tile
    first_open[:, 0].scatter_(-1, sink_pages[:, None], 0)
    return Plan(block, tile, listed, first_open, counts, everything=True)


def page_mask(plan: Plan, pages: int) -> torch.Tensor:
    """Which page every row of the plan's block sees.

    Args:
        plan: A plan over at most ``pages`` pages.
        pages: Closed pages.

    Returns:
        (choosers, rows, pages) bool.
    """
    first = plan.pages.new_full((*plan.pages.shape[:2], pages + 1), plan.tile, dtype=torch.int16)
    index = plan.pages.where(plan.pages >= 0, pages)
    first.scatter_(-1, index, plan.first_open.to(torch.int16))
    row = torch.arange(plan.tile, dtype=torch.int16, device=first.device)
    seen = first[:, :, None, :pages] <= row[:, None]  # (choosers, tiles, rows of a tile, pages)
    return seen.flatten(1, 2)[:, plan.lead : plan.lead + plan.block.stop - plan.block.start]
