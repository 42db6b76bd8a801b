"""Where the kernels for Hopper can run a call, and how they are launched.

They are an addition: everything they do ``attend_kernel`` does too, on any GPU and for any shape.
"""

import functools
import re

import torch
import triton

from llama_surgery.attention.impl.triton.decode.tuning import processors_of
from llama_surgery.attention.impl.triton.helpers import LOG2E
from llama_surgery.attention.impl.triton.job import Job, Strip
from llama_surgery.attention.impl.triton.launch import aligned, placed_rows
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan

#: Keys of a block, and rows of a tile.
BLOCK = 64

#: Channels that the copy engine brings at a time: a line of swizzled shared memory.
SLAB = 64

#: Sizes of pages of which a block is made; smaller ones would take a copy for few keys.
PAGES = (16, 32, BLOCK)

#: First and last version of Triton with which these kernels have been compiled: their language, Gluon, is
#: still changing.
TRITON = (3, 6), (3, 9)

#: Blocks of keys and of values that there is room for, for each of two tiles. Values are needed a step later.
KEY_STAGES, VALUE_STAGES = 2, 3


def attends(job: Job) -> bool:
    """Can they attend to the near field and to pages? Otherwise ``attend_kernel`` does.

    Rows of a tile must fill a warpgroup's matrix tile exactly, pages be blocks or halves or quarters of them,
    channels be whole swizzled lines; logits have no cap.
    """
    dim = job.queries.shape[-1]
    return (
        job.tuning.specialised
        and _known_triton()
        and job.queries.dtype in (torch.float16, torch.bfloat16)
        and job.tile == BLOCK
        and dim in (64, 128)
        and job.near_values.shape[-1] == dim
        and job.config.page_size in PAGES
        and job.softcap is None
    )


@functools.cache
def _known_triton() -> bool:
    # Not by the name of the installed package: it differs (pytorch-triton, triton-windows).
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return numbers is not None and TRITON[0] <= (int(numbers[1]), int(numbers[2])) <= TRITON[1]


def _described(states: torch.Tensor, *block: int) -> object:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _shared_layout(states.dtype, *block)
    return TensorDescriptor.from_tensor(aligned(states, block[-1]), [1, *block], layout)


@functools.cache  # to find it takes the host as long as a launch
def _shared_layout(dtype: torch.dtype, *block: int) -> object:
    from triton.experimental.gluon import language as gl

    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, *block], kind)


def attend_strip(
    job: Job, strip: Strip, plan: TiledPlan | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """See :func:`prefill.attend_strip`."""
    from llama_surgery.attention.impl.triton.hopper.attend_kernel import hopper_attend_kernel

    choosers, dim = job.queries.shape[0], job.queries.shape[-1]
    near = [_described(states, BLOCK, dim) for states in (job.near_keys, job.near_values)]
    far, entries, counts = near, None, None
    blocks: tuple[torch.Tensor | None, int] = None, 0
    if plan is not None:
        assert job.layout is not None
        page = job.config.page_size
        far = [_described(states, page, SLAB) for states in (job.layout.keys, job.layout.values)]
        blocks, entries, counts = job.blocks, plan.entries, plan.counts
    programs = triton.cdiv(choosers * strip.tiles, 2)
    hopper_attend_kernel[(min(programs, processors_of(out.device)),)](
        _described(job.queries[:, 0], BLOCK, dim),
        *near,
        *far,
        *blocks,
        entries,
        counts,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        job.sink_logit,
        out,
        lse,
        out.stride(0),
        out.stride(2),
        lse.stride(0),
        choosers,
        strip.tiles,
        strip.pages,
        *placed_rows(job, strip),
        job.scale * LOG2E.value,
        GROUP=job.group,
        DIM=dim,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        PAGE=job.config.page_size,
        FAR=plan is not None,
        SUMMARY=job.means is not None,
        SINK=job.sink_logit is not None,
        KEY_STAGES=KEY_STAGES,
        VALUE_STAGES=VALUE_STAGES,
        num_warps=4,
    )
