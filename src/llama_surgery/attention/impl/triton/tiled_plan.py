"""A plan of a whole run of tiles, as the kernels write it."""

import dataclasses

import torch

from llama_surgery.attention.impl.triton.pieces import PieceTable
from llama_surgery.topology.geometry import Block

#: A list entry is ``page * ENTRY + first_open``.
ENTRY = 256


@dataclasses.dataclass(frozen=True)
class TiledPlan:
    """Far pages of consecutive tiles whose rows may differ in closed chunks; choosers are those of ``Plan``.

    Attributes:
        start: Position of the first row.
        stop: One past the position of the last row.
        tile: Queries of a tile; the first and the last may be partial.
        counts: (choosers, tiles) int32, pages of each tile.
        rows_seen: (choosers, tiles) int32, for how many rows its pages are visible, summed over pages.
        entries: (choosers, tiles, capacity) int32 lists, the first ``counts`` of each are valid: ascending
            ``page * ENTRY + first_open``; None where they were not kept.
        pages: Closed pages of the last tile, where the lists have no room for as many.
        pieces: Where the tiles are several sequences': then only what is counted has a meaning.
    """

    start: int
    stop: int
    tile: int
    counts: torch.Tensor
    rows_seen: torch.Tensor
    entries: torch.Tensor | None = None
    pages: int = 0
    pieces: PieceTable | None = None

    def trimmed(self) -> "TiledPlan":
        """The same plan with lists as long as the longest of them, the rest of their memory given back.

        Lists are written with room for every closed page, which is many times what is opened. The length is
        read back to the host; nothing is while a graph is captured, where the plan stays as it is.
        """
        assert self.entries is not None
        if self.entries.is_cuda and torch.cuda.is_current_stream_capturing():
            return self
        longest, room = int(self.counts.max()), self.entries.shape[-1]
        if longest == room:
            return self
        # A copy also where the slice is contiguous: it would hold on to the whole.
        return dataclasses.replace(self, entries=self.entries[..., :longest].clone(), pages=room)

    def executed_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,) int64: (query, key) pairs the far pass reads for one query head."""
        if self.pieces is not None:
            return (self.counts * self.pieces.fields[:, 7]).sum(1) * page_size
        pairs = self.counts.sum(1) * (self.tile * page_size)
        for place, missing in ((0, self.start % self.tile), (-1, -self.stop % self.tile)):
            if missing:  # rows of the first or last tile
                pairs = pairs - self.counts[:, place].long() * (missing * page_size)
        return pairs

    def visible_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,) int64: pairs that the rows may see, first-open rows respected."""
        return self.rows_seen.sum(1) * page_size

    def first_open(self) -> torch.Tensor:
        """(choosers, tiles, pages) int64: first row that opened each page, ``tile`` where none did."""
        if self.entries is None:
            raise ValueError("the lists of this plan were not kept: ask for keep_lists=True.")
        room = self.entries.shape[-1]
        pages = max(room, self.pages)
        listed = torch.arange(room, device=self.entries.device)
        valid = listed < self.counts.unsqueeze(-1)
        page = (self.entries // ENTRY).where(valid, pages).long()
        opened = (self.entries % ENTRY).where(valid, self.tile).long()
        full = opened.new_full((*self.counts.shape, pages + 1), self.tile)
        return full.scatter_(-1, page, opened)[..., :pages]

    def seen(self, block: Block, pages: int) -> torch.Tensor:
        """(choosers, rows, pages) bool: which of the first ``pages`` pages the rows of ``block`` see."""
        assert self.entries is not None
        first = block.start // self.tile
        tiles = slice(
            first - self.start // self.tile, (block.stop - 1) // self.tile + 1 - self.start // self.tile
        )
        of_block = dataclasses.replace(self, counts=self.counts[:, tiles], entries=self.entries[:, tiles])
        row = torch.arange(block.start, block.stop, device=self.counts.device)
        first_open = of_block.first_open()[..., :pages]
        return first_open[:, row // self.tile - first] <= (row % self.tile)[:, None]
