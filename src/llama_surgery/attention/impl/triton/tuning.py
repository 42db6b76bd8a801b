"""Launch configurations per GPU family: one small table, with a default."""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernels are launched.

    Attributes:
        rows: Most rows of a matrix tile (tokens x heads) in attention.
        block_near: Keys of a step of the near field.
        keys_per_step: Keys of a step of the far field; pages smaller than this are taken together.
        attend_warps, attend_stages: Of the attention kernel.
        score_rows: Most rows of a matrix tile in selection.
        block_pages: Pages of a step of selection.
        score_warps, score_stages: Of the selection kernel.
        score_registers: Most registers of a thread of it, so that more programs fit a processor; 0 leaves it
            to the compiler.
        shared: Bytes of shared memory that a program may take: pages are loaded ahead where there is room.
        specialised: Take the kernels whose warps share loading and computing (``hopper``) where they can run.
    """

    rows: int = 128
    block_near: int = 64
    keys_per_step: int = 64
    attend_warps: int = 8
    attend_stages: int = 2
    score_rows: int = 128
    block_pages: int = 64
    score_warps: int = 8
    score_stages: int = 2
    score_registers: int = 0
    shared: int = 160 << 10
    specialised: bool = False


#: For the families whose processors have 99 KiB of shared memory.
_SMALL = Tuning(rows=64, attend_warps=4, score_rows=32, score_warps=4, block_pages=32, shared=99 << 10)

#: By family, for head dims up to 128.
TABLE = {
    "sm80": Tuning(),
    "sm86": _SMALL,
    "sm89": _SMALL,
    "sm120": _SMALL,
    "sm90": Tuning(
        keys_per_step=32,
        attend_warps=4,
        score_rows=64,
        score_warps=4,
        score_stages=3,
        block_pages=32,
        shared=227 << 10,
        specialised=True,
    ),
    "sm100": Tuning(attend_stages=3, score_stages=3, shared=227 << 10),
    "gfx942": Tuning(attend_stages=1, score_stages=1, shared=64 << 10),
    "gfx950": Tuning(attend_stages=2, score_stages=1),
}


@functools.cache
def family_of(device: torch.device) -> str:
    """Family of a device: ``sm`` and the compute capability, or the ``gfx`` name; ``cpu`` without one.

    GPUs that TABLE does not name belong to a family of at most their shared memory.
    """
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = str(properties.gcnArchName).split(":")[0]
        return name if name in TABLE else "gfx942"
    name = f"sm{properties.major}{properties.minor}"
    if name in TABLE:
        return name
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    return next((family for family in ("sm100", "sm80") if TABLE[family].shared <= room), "sm89")


def tuning_for(family: str, head_dim: int, element_size: int, exact: bool = False) -> Tuning:
    """The configuration for a family, shrunk where wide or long elements need more shared memory.

    ``exact`` products of float32 are made without matrix units on NVIDIA's GPUs, from factors that every
    thread keeps in registers: selection then takes small matrix tiles, whose factors fit. They pass through
    shared memory, which leaves no room on small GPUs for loads ahead.
    """
    tuning = TABLE.get(family, Tuning())
    bytes_per_row = head_dim * element_size
    if family == "sm90" and bytes_per_row <= 128:
        tuning = dataclasses.replace(tuning, score_registers=168)  # three programs to a processor
    if bytes_per_row > 256:
        tuning = dataclasses.replace(
            tuning,
            rows=tuning.rows // 2,
            block_near=32,
            keys_per_step=32,
            attend_stages=min(tuning.attend_stages, 2),
            score_rows=tuning.score_rows // 2,
            block_pages=tuning.block_pages // 2,
            score_stages=min(tuning.score_stages, 2),
        )
    if bytes_per_row > 512:
        tuning = dataclasses.replace(
            tuning, rows=32, score_rows=32, attend_stages=1, score_stages=1, attend_warps=4
        )
    if exact and family.startswith("sm"):
        tuning = dataclasses.replace(tuning, score_rows=32, block_pages=16, score_warps=4)
        if tuning.shared < TABLE["sm80"].shared:
            tuning = dataclasses.replace(tuning, score_stages=1)
    return tuning
