"""How the kernels of the backward pass are launched, per GPU family."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BackwardTuning:
    """Launch configuration.

    Attributes:
        rows: Most rows of a matrix tile (tokens x heads) of the kernels of queries and far keys.
        block_near: Keys of a step of the near field, in the kernel of queries.
        block_keys, block_rows: Keys of a program and rows of a step, in the kernel of near keys.
        query_warps, near_warps, far_warps: Of the three kernels.
        stages: Of all three. Not one on Hopper in half precision: without pipelining, gradients of keys of
            256 channels came out wrong (Triton 3.6; docs/log.md).
    """

    rows: int = 128
    block_near: int = 32
    block_keys: int = 64
    block_rows: int = 64
    query_warps: int = 8
    near_warps: int = 8
    far_warps: int = 8
    stages: int = 2


#: For the families whose processors have little shared memory.
_SMALL = BackwardTuning(
    rows=64, block_keys=32, block_rows=32, query_warps=4, near_warps=4, far_warps=4, stages=1
)

#: By family, for head dims up to 128 in half precision. Families that are not listed take the default.
TABLE = {
    "sm86": _SMALL,
    "sm89": _SMALL,
    "sm120": _SMALL,
    "gfx942": _SMALL,
    "gfx950": dataclasses.replace(_SMALL, stages=2),
}


def backward_tuning_for(family: str, head_dim: int, element_size: int) -> BackwardTuning:
    """The configuration for a family, shrunk where wide or long elements need more shared memory."""
    tuning = TABLE.get(family, BackwardTuning())
    bytes_per_row = head_dim * element_size
    if bytes_per_row > 256:
        tuning = dataclasses.replace(tuning, rows=tuning.rows // 2, block_keys=32, block_rows=32)
    if bytes_per_row > 512:
        tuning = dataclasses.replace(tuning, rows=32, block_near=16, block_keys=16, block_rows=16, stages=1)
    return tuning
