"""Which chunks are closed for which query, and how rows group into tiles and blocks.

All positions are positions of real tokens in their own sequence, counted from 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llama_surgery.config import SurgeryConfig


class Block(NamedTuple):
    """Consecutive rows with the same closed chunks.

    Attributes:
        start: Position of the first row.
        stop: One past the position of the last row.
        closed: Number of closed chunks; the near field starts at ``closed * chunk_size``.
    """

    start: int
    stop: int
    closed: int


def closed_chunks(position: int, config: SurgeryConfig, tile: int) -> int:
    """Closed chunks for the query at ``position`` in tiles of ``tile`` queries.

    Chunk c is closed when ``(c + 1) * chunk_size <= q0 - window`` with q0 the first position of the
    query's tile; none is closed below ``dense_until``.
    """
    first = position // tile * tile
    if first < config.dense_until:
        return 0
    return max(0, (first - config.window) // config.chunk_size)


def first_far(config: SurgeryConfig) -> int:
    """The first position whose query has a closed chunk."""
    return max(config.dense_until, config.chunk_size + config.window)


def query_blocks(start: int, stop: int, config: SurgeryConfig, tile: int) -> Iterator[Block]:
    """Cut rows ``start … stop - 1`` into blocks of equal closed chunks.

    Blocks hold at most ``chunk_size`` rows, so that what a block needs in memory grows with the
    length of the text but not with its square, and begin at multiples of ``tile`` but for the first.
    """
    while start < stop:
        closed = closed_chunks(start, config, tile)
        next_change = (closed + 1) * config.chunk_size + config.window
        if start < config.dense_until:
            next_change = config.dense_until
        limit = min(stop, start - start % tile + config.chunk_size, next_change)
        yield Block(start, limit, closed)
        start = limit


def causal_pairs(start: int, stop: int) -> int:
    """(Query, key) pairs that dense attention reads for rows ``start … stop - 1`` of one query head."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def near_pairs(start: int, stop: int, config: SurgeryConfig, tile: int) -> int:
    """Pairs of the near fields of rows ``start … stop - 1``; ``tile`` as in :func:`summary_pairs`."""
    return causal_pairs(start, stop) - closed_in_all(start, stop, config, tile) * config.chunk_size


def closed_in_all(start: int, stop: int, config: SurgeryConfig, tile: int) -> int:
    """Closed chunks of rows ``start … stop - 1``, added up over the rows."""
    blocks = query_blocks(start, stop, config, tile)
    return sum((block.stop - block.start) * block.closed for block in blocks)


def summary_pairs(start: int, stop: int, config: SurgeryConfig, tile: int) -> float:
    """What rows ``start … stop - 1`` multiply with means at most, in (query, key) pairs.

    Every page of a closed chunk is taken to be unseen. It costs one product with a mean value, half of what a
    (query, key) pair costs; its score is made for the selection in any case. With θ = 0 nothing is unseen.
    ``tile`` is ``config.tile`` in prefill, 1 in decode steps.
    """
    if not config.summarises(tile):
        return 0.0
    return closed_in_all(start, stop, config, tile) * config.pages_per_chunk / 2


def summary_density(config: SurgeryConfig, length: int) -> float:
    """:func:`summary_pairs` of a prefill of ``length`` tokens, over its causal pairs as densities are."""
    return summary_pairs(0, length, config, config.tile) / causal_pairs(0, length)
