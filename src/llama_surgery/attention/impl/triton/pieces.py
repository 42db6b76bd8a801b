"""Rows of several sequences in one call."""

from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks

#: Most rows of a matrix tile, and keys or pages of a step: see :mod:`~.tuning`.
LARGEST_MATRIX, BEHIND = 128, 64


class Piece(NamedTuple):
    """Consecutive rows of one sequence among those of a call.

    Attributes:
        start: Position of the first row.
        stop: One past the position of the last row.
        row: Of the first row, among the call's queries.
        near: Where the near field's first key is among the call's near keys.
        page: Where the first page is among the call's pages.
    """

    start: int
    stop: int
    row: int
    near: int
    page: int


def tiles_together(tile: int) -> int:
    """Tiles of one piece that a program of selection may have: rows of the table are padded to multiples."""
    return max(1, LARGEST_MATRIX // (1 << (tile - 1).bit_length()))


class PieceTable:
    """Rows of several sequences, computed in one call as if they were one's.

    What lies behind a piece's own near keys and pages is loaded too, if seen by no row: leave room for
    BEHIND of both, and fill it with finite numbers.

    Args:
        pieces: The rows.
        config: The topology.
        tile: Queries of a tile.
        device: Of the call.

    Attributes:
        fields: (tiles, 8) int32. Of every tile: positions of its first query, of what the call's first row
            would be in its sequence, of its piece's first row, of one past the last, of the call's first near
            key; the piece's first page, its number; the tile's rows. A tile without rows has zeros.
        pages: Most closed pages of a tile.
    """

    def __init__(self, pieces: list[Piece], config: SurgeryConfig, tile: int, device: torch.device) -> None:
        together, rows = tiles_together(tile), list[tuple[int, ...]]()
        for number, (start, stop, row, near, page) in enumerate(pieces):
            near = closed_chunks(start, config, tile) * config.chunk_size - near
            for first in range(start // tile * tile, stop, tile):
                count = min(first + tile, stop) - max(first, start)
                rows.append((first, start - row, start, stop, near, page, number, count))
            # No program of selection has tiles of two pieces.
            rows += [(0,) * 8] * (-len(rows) % together)
        self.fields = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
        closed = [closed_chunks(piece.stop - 1, config, tile) for piece in pieces]
        self.pages = max(closed) * config.pages_per_chunk
