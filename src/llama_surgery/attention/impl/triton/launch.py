"""How a call is packed into launches: matrix tiles and descriptors."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_surgery.attention.impl.triton.job import Job, Strip


def placed_rows(job: Job, strip: Strip) -> tuple[torch.Tensor | int | None, ...]:
    """Arguments of kernels that read the near field: which rows are given, and where keys and tiles begin."""
    pieces = None if job.pieces is None else job.pieces.fields
    return pieces, job.start, job.stop, job.near_start, strip.first_tile, job.config.dense_until


def heads_of_tile(heads: int, rows: int, tile_pad: int) -> int:
    """Heads of a matrix tile: a power of two, at most ``rows`` rows and at least 16."""
    most = max(1, rows // tile_pad)
    return max(min(triton.next_power_of_2(heads), most), 16 // tile_pad, 1)


def described(states: torch.Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of (streams, …, dim) states that loads a ``block`` of one stream, zeros beyond."""
    return TensorDescriptor.from_tensor(aligned(states, block[-1]), [1, *block])


def aligned(states: torch.Tensor, width: int) -> torch.Tensor:
    """States that tensor maps take: rows begin at multiples of 16 bytes. Others are copied, made ``width``
    wide."""
    unit = 16 // states.element_size()
    if states.data_ptr() % 16 or any(stride % unit for stride in states.stride()[:-1]):
        states = torch.nn.functional.pad(states, (0, width - states.shape[-1])).contiguous()
        if states.data_ptr() % 16:
            states = states.clone()
    return states
