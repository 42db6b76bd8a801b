"""The kernel that turns moments into what selection multiplies queries with."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import load_rows


@triton.jit
def feature_kernel(
    mean_ptr,
    variance_ptr,
    out_ptr,
    moment_stream,
    out_stream,
    out_row,
    pages,
    largest,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGES: tl.constexpr,
):
    """μ and ½·σ² of pages, side by side.

    Moments (streams, pages, DIM) float32, rows contiguous. Grid: (pages / PAGES rounded up, streams).
    """
    stream = tl.program_id(1).to(tl.int64)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    present = page < pages
    means, variances = mean_ptr + stream * moment_stream, variance_ptr + stream * moment_stream
    mean = load_rows(means, page, DIM, present, DIM, DIM_PAD, True)
    spread = load_rows(variances, page, DIM, present, DIM, DIM_PAD, True) * 0.5
    spread = tl.minimum(spread, largest)
    channel = tl.arange(0, DIM_PAD)
    row = out_ptr + stream * out_stream + page.to(tl.int64)[:, None] * out_row + channel[None, :]
    dtype = out_ptr.dtype.element_ty
    there = present[:, None] & (channel < DIM)[None, :]
    tl.store(row, mean.to(dtype), mask=there)
    tl.store(row + DIM, spread.to(dtype), mask=there)
