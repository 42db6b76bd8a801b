"""How the kernels of decode are launched: splits, block sizes, warps, per GPU family."""

import dataclasses
import functools
import math

import torch

from llama_surgery.config import SurgeryConfig

#: Most programs that share the work of one stream in one kernel.
MOST_SPLITS = 128

#: Closed pages that one program of the second kernel looks through, at least.
FEWEST_PAGES = 16

#: Programs per processor beyond which the second kernel is not split for balance: each costs something, also
#: where a sequence is short and leaves it nothing to do.
MOST_PROGRAMS = 16

#: Elements of partial results (parts x value dim) that one program of the third kernel holds.
MERGED_ELEMENTS = 1 << 14

#: Most rows (queries x heads) of a matrix tile, unless one query's heads alone are more.
MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class DecodeTuning:
    """Launch configuration.

    Attributes:
        step_bytes: Bytes of keys and values (or of a page's moments) of a step.
        score_warps, score_stages: Of the first kernel: near field and scores.
        open_warps, open_stages: Of the second kernel: opened pages.
        merge_parts, merge_warps: Of the third kernel: partial results of a step, at most.
        programs: Programs per processor that the streams are split into, at least.
        most_steps: Steps of a program of the first kernel, at most.
        most_pages: Closed pages that a program of the second kernel looks through, at most; four times as
            many where there would be more than MOST_PROGRAMS. Both bounds hold up to MOST_SPLITS programs a
            stream; they keep long sequences of a ragged batch from ending last.
    """

    step_bytes: int = 1 << 15
    score_warps: int = 4
    score_stages: int = 2
    open_warps: int = 4
    open_stages: int = 3
    merge_parts: int = 128
    merge_warps: int = 8
    programs: int = 4
    most_steps: int = 8
    most_pages: int = 64

    def keys_per_step(self, head_dim: int, value_dim: int, element_size: int) -> int:
        """Keys of a step: a power of two, 16 to 128."""
        fit = self.step_bytes // ((head_dim + value_dim) * element_size)
        return min(128, max(16, 1 << (fit.bit_length() - 1 if fit else 0)))


#: For the families whose processors have 99 KiB of shared memory.
_SMALL = DecodeTuning(open_stages=2)

#: By family. Families that are not listed take the default.
TABLE = {
    "sm86": _SMALL,
    "sm89": _SMALL,
    "sm120": _SMALL,
    "gfx942": DecodeTuning(step_bytes=1 << 14, score_stages=2, open_stages=2),
    "gfx950": DecodeTuning(score_stages=2, open_stages=2),
}


def decode_tuning_for(family: str) -> DecodeTuning:
    """The configuration for a family of :func:`tuning.family_of`."""
    return TABLE.get(family, DecodeTuning())


@functools.cache
def processors_of(device: torch.device) -> int:
    """Processors of a GPU; a few where there is none, so that work is split there too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def score_splits(units: int, streams: int, processors: int, tuning: DecodeTuning) -> int:
    """Programs per stream of the first kernel.

    Args:
        units: Most steps that a stream's near field and scores can take.
        streams: Rows of the grid.
    """
    wanted = max(math.ceil(tuning.programs * processors / streams), math.ceil(units / tuning.most_steps))
    return max(1, min(units, wanted, MOST_SPLITS))


def open_splits(
    config: SurgeryConfig, pages: int, streams: int, processors: int, tuning: DecodeTuning
) -> int:
    """Programs per stream of the second kernel, which take pages in turn.

    It has no factor in common with the pages of a chunk: pages that are opened often lie at the same place
    of every chunk, and would all fall to the same programs.

    Args:
        pages: Most closed pages.
    """
    bound = min(math.ceil(pages / tuning.most_pages), math.ceil(MOST_PROGRAMS * processors / streams))
    bound = max(bound, math.ceil(pages / (4 * tuning.most_pages)))
    wanted = max(math.ceil(tuning.programs * processors / streams), bound)
    splits = max(1, min(wanted, math.ceil(pages / FEWEST_PAGES), MOST_SPLITS))
    while math.gcd(splits, config.pages_per_chunk) > 1:
        splits += 1
    return splits
