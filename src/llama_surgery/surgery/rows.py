"""How the rows of a call are computed: in tiles, or one by one."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import first_far


class Part(NamedTuple):
    """Consecutive rows that are computed alike.

    Attributes:
        start: Position of the first row.
        stop: One past the position of the last row.
        tile: Queries of a tile.
    """

    start: int
    stop: int
    tile: int


def parts_of(
    start: int, stop: int, config: SurgeryConfig, *, step: bool = False, prompt_end: int | None = None
) -> Iterator[Part]:
    """Cut the rows of a call, the only place that decides on tiles: docs/semantics.md, "Tiles".

    Args:
        start: Position of the first row.
        stop: One past the position of the last row.
        step: Is the call a decode step?
        prompt_end: While ``generate()`` runs, tokens of the sequence's prompt.
    """
    tile = 1 if step else config.tile
    ends = [stop]
    if prompt_end is not None and not step:
        # The end of a prompt decides the answer: the rows of its last tile, where it is not a whole one, have
        # pages of their own.
        ends = [prompt_end - prompt_end % tile, prompt_end, stop]
    for index, end in enumerate(ends):
        end = min(end, stop)
        if start < end:
            yield Part(start, end, 1 if index else tile)
            start = end


def sparse_parts(parts: Iterable[Part], config: SurgeryConfig) -> list[Part]:
    """Of ``parts``, the rows that have a far field and do not read all of it."""
    far = (part._replace(start=max(part.start, first_far(config))) for part in parts)
    return [part for part in far if part.start < part.stop and config.theta_for(part.tile)]


def whole_rows(
    start: int, stop: int, config: SurgeryConfig, *, step: bool = False, prompt_end: int | None = None
) -> tuple[Part, ...]:
    """The first rows of a call that see every position up to their own: all, or those below ``dense_until``.

    Arguments are those of :func:`parts_of`.
    """
    parts = tuple(parts_of(start, stop, config, step=step, prompt_end=prompt_end))
    if not sparse_parts(parts, config):
        return parts
    return tuple(parts_of(start, min(stop, config.dense_until), config, step=step, prompt_end=prompt_end))
