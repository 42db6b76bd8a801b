"""Where the kernels for Hopper can run a call, and how they are launched.

They are an addition: everything they do ``attend_kernel`` does too, on any GPU and for any shape.
"""

import functools
import re

import torch
import triton

from llama_surgery.attention.impl.triton.decode_tuning import processors_of
from llama_surgery.attention.impl.triton.helpers import LOG2E
from llama_surgery.attention.impl.triton.job import Job, Strip
from llama_surgery.attention.impl.triton.launch import aligned, placed_rows
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan

#: Keys of a block, rows of a tile.
BLOCK, ROWS = 64, 128

#: First and last version of Triton with which these kernels have been compiled: their language, Gluon, is
#: still changing.
TRITON = (3, 6), (3, 9)

#: Blocks that are loaded ahead.
ATTEND_STAGES = 4


def attends(job: Job) -> bool:
    """Can they attend to the near field and to pages? Otherwise ``attend_kernel`` does.

    Rows of a tile must fill a matrix tile exactly, pages be blocks, channels be half a swizzled line or whole
    ones; logits have no cap.
    """
    dim = job.queries.shape[-1]
    return (
        job.tuning.specialised
        and _known_triton()
        and job.queries.dtype in (torch.float16, torch.bfloat16)
        and job.tile in (16, 32, 64)
        and triton.next_power_of_2(job.queries.shape[1]) >= ROWS // job.tile
        and dim in (64, 128)
        and job.near_values.shape[-1] == dim
        and job.config.page_size == BLOCK
        and job.softcap is None
    )


@functools.cache
def _known_triton() -> bool:
    # Not by the name of the installed package: it differs (pytorch-triton, triton-windows).
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return numbers is not None and TRITON[0] <= (int(numbers[1]), int(numbers[2])) <= TRITON[1]


def _described(states: torch.Tensor, *block: int) -> object:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if states.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([1, *block], dtype)
    return TensorDescriptor.from_tensor(aligned(states, block[-1]), [1, *block], layout)


def attend_strip(
    job: Job, strip: Strip, plan: TiledPlan | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """See :func:`prefill.attend_strip`."""
    from llama_surgery.attention.impl.triton.hopper_attend_kernel import hopper_attend_kernel

    streams, heads, _, dim = job.queries.shape
    heads_block = ROWS // job.tile
    near = [_described(states, BLOCK, dim) for states in (job.near_keys, job.near_values)]
    far, entries, counts = near, None, None
    if plan is not None:
        assert job.layout is not None
        far = [_described(states, BLOCK, dim) for states in (job.layout.keys, job.layout.values)]
        entries, counts = plan.entries, plan.counts
    units = streams * strip.tiles * triton.cdiv(heads, heads_block)
    hopper_attend_kernel[(min(units, processors_of(out.device)),)](
        _described(job.queries, heads_block // 2, job.tile, dim),
        *near,
        *far,
        entries,
        counts,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        job.sink_logit,
        out,
        lse,
        *out.stride()[:3],
        *lse.stride()[:2],
        streams,
        strip.tiles,
        strip.pages,
        *placed_rows(job, strip),
        job.scale * LOG2E.value,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        TILE=job.tile,
        DIM=dim,
        CHUNK=job.config.chunk_size,
        WINDOW=job.config.window,
        FAR=plan is not None,
        SINK=job.sink_logit is not None,
        STAGES=ATTEND_STAGES,
        num_warps=4,
    )
