"""Which pieces of prompts of a step are computed in one set of launches, and where what they read lies."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from llama_surgery.attention.impl.triton.pieces import BEHIND, Piece, PieceTable, tiles_together
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.rows import Part
from llama_surgery.topology.geometry import closed_chunks

if TYPE_CHECKING:
    from llama_surgery.serving.paged import Scheduled


@dataclasses.dataclass(frozen=True)
class Launch:
    """Rows of one sequence or of several, all with one tile size, computed together. All layers share it.

    Attributes:
        pieces: The rows, and whose they are.
        near: (n,) int64 twice, block and row of every near key, piece after piece; or a slice of the step's
            own rows, where a single piece reads no others.
        far: (n,) int64, blocks of closed chunks, piece after piece.
        first: (pieces,) int64: the block of every piece's first chunk.
        table: The rows as the kernels want them; None for plain PyTorch.
    """

    pieces: "list[tuple[Scheduled, Part]]"
    near: tuple[torch.Tensor, torch.Tensor] | slice
    far: torch.Tensor
    first: torch.Tensor
    table: PieceTable | None


def make_launch(pieces: "list[tuple[Scheduled, Part]]", config: SurgeryConfig, *, kernels: bool) -> Launch:
    """Rows with one tile size, and where what they read lies. Nothing is asked of the device.

    What is loaded behind the keys and pages of one of several pieces repeats its last ones, so that no
    sequence multiplies by another's numbers.
    """
    size, each, tile = config.chunk_size, config.pages_per_chunk, pieces[0][1].tile
    behind = BEHIND if len(pieces) > 1 else 0
    runs, table, base, keys, chunks = [], [], 0, 0, 0
    for sequence, part in pieces:
        since, row = (
            closed_chunks(part.start, config, tile) * size,
            sequence.row + part.start - sequence.start,
        )
        closed = closed_chunks(part.stop - 1, config, tile)
        table.append(Piece(part.start, part.stop, row, keys, chunks * each))
        near, far = part.stop - since + behind, _with_room(closed, each, behind)
        # The sequence's first chunk; position of the first key, of the last, from one to the next; how many.
        runs.append((base, since, part.stop - 1, 1, near))
        runs.append((base, 0, max(0, closed - 1) * size, size, far))
        base, keys, chunks = base + len(sequence.blocks), keys + near, chunks + far
    blocks = torch.cat([sequence.blocks for sequence, _ in pieces])
    held = torch.tensor(runs[::2] + runs[1::2]).T.to(blocks.device, non_blocking=True)
    run = torch.repeat_interleave(held[4], output_size=keys + chunks)
    first, begin, last, step, _ = held[:, run]
    place = torch.arange(keys + chunks, device=run.device) - (held[4].cumsum(0) - held[4])[run]
    position = torch.minimum(begin + place * step, last)
    found = blocks[first + position // size]
    own: tuple[torch.Tensor, torch.Tensor] | slice = found[:keys], (position % size)[:keys]
    if len(pieces) == 1 and since >= sequence.start:
        own = slice(sequence.row + since - sequence.start, row + part.stop - part.start)
    made = PieceTable(table, config, tile, blocks.device) if kernels else None
    return Launch(pieces, own, found[keys:], blocks[held[0, : len(pieces)]], made)


def _with_room(closed: int, each: int, behind: int) -> int:
    """Chunks of ``each`` pages that ``closed`` ones fill, with what is loaded behind their last page."""
    return closed + -(-(-closed * each % max(1, behind)) // each)


def launches(
    pieces: "list[tuple[Scheduled, Part]]", config: SurgeryConfig, heads: int | None, chunk_bytes: int
) -> Iterator[Launch]:
    """As few launches as the memory of page lists and of what is copied allows.

    Args:
        pieces: Rows of a step, and whose they are.
        config: The topology.
        heads: Query heads of a layer; None for plain PyTorch, which computes piece by piece.
        chunk_bytes: What a launch copies of every closed chunk of each of its pieces.
    """
    if heads is None:
        yield from (make_launch([piece], config, kernels=False) for piece in pieces)
        return
    from llama_surgery.attention.impl.triton import job

    room, most = job.STRIP_BYTES // (4 * heads), job.STRIP_BYTES // max(1, chunk_bytes)
    tiles = chunks = 0
    together: list[tuple[Scheduled, Part]] = []
    # Long rows last: the kernels begin with them.
    for sequence, whole in sorted(pieces, key=lambda piece: (piece[1].tile, piece[1].stop)):
        tile = whole.tile
        closed, padded = closed_chunks(whole.stop - 1, config, tile), tiles_together(tile)
        pages, held = (
            max(1, closed * config.pages_per_chunk),
            _with_room(closed, config.pages_per_chunk, BEHIND),
        )
        rows = max(1, room // pages) * tile
        for begin in range(whole.start // tile * tile, whole.stop, rows):
            part = Part(max(begin, whole.start), min(begin + rows, whole.stop), tile)
            count = -(-(-(-part.stop // tile) - part.start // tile) // padded) * padded
            full = (tiles + count) * pages > room or chunks + held > most
            if together and (full or together[0][1].tile != tile):
                yield make_launch(together, config, kernels=True)
                together, tiles, chunks = [], 0, 0
            together.append((sequence, part))
            tiles, chunks = tiles + count, chunks + held
    if together:
        yield make_launch(together, config, kernels=True)
