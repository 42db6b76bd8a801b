"""Which rows a call has, and how they are computed: in tiles, or one by one."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import first_far

#: Attribute of a mask under which what was asked about it is kept for the call's other layers.
_COLUMNS = "_llama_surgery_columns"


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


def columns_of(mask: torch.Tensor, slots: int) -> tuple[list[int], list[torch.Tensor | None]]:
    """Real tokens among the first ``slots`` columns, and indices of the real ones among the others.

    The device is asked once for a call, not once for every layer: the mask keeps the answer.

    Args:
        mask: (batch, columns) bool, True for real tokens; the same object for all layers of a call.
        slots: Columns that earlier calls brought.

    Returns:
        For every sequence the number, and the indices (int64), None where all are real.
    """
    known = getattr(mask, _COLUMNS, None)
    if known is None or known[0] != slots:
        new = mask[:, slots:]
        before, after = torch.stack((mask[:, :slots].sum(1), new.sum(1))).tolist()
        columns = [
            None if count == new.shape[1] else row.nonzero().squeeze(1)
            for count, row in zip(after, new, strict=True)
        ]
        known = slots, before, columns
        setattr(mask, _COLUMNS, known)
    return list(known[1]), list(known[2])
