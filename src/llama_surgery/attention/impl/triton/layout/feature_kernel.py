"""The kernel that turns moments into what selection multiplies queries with."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import EXACT, load_rows


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
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
    PAGES: tl.constexpr,
):
    """μ and ½·σ² of pages, σ² pooled over DIM / SPREAD channels.

    Moments (streams, pages, DIM) float32, rows contiguous. Grid: (pages / PAGES rounded up, streams).
    """
    stream = tl.program_id(1).to(tl.int64)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    present = page < pages
    means, variances = mean_ptr + stream * moment_stream, variance_ptr + stream * moment_stream
    mean = load_rows(means, page, DIM, present, DIM, DIM_PAD, True)
    spread = load_rows(variances, page, DIM, present, DIM, DIM_PAD, True) * 0.5
    channel, group = tl.arange(0, DIM_PAD), tl.arange(0, SPREAD_PAD)
    if SPREAD < DIM:
        # As a product with a matrix of ones and zeros: head dims need not be powers of two.
        member = channel % (DIM // 2) // (DIM // (2 * SPREAD))
        member = (member[:, None] == group[None, :]) & (channel < DIM)[:, None]
        spread = tl.dot(spread, member.to(tl.float32), input_precision=EXACT) * (SPREAD / DIM)
    spread = tl.minimum(spread, largest)
    row = out_ptr + stream * out_stream + page.to(tl.int64)[:, None] * out_row
    dtype = out_ptr.dtype.element_ty
    tl.store(row + channel[None, :], mean.to(dtype), mask=present[:, None] & (channel < DIM)[None, :])
    tl.store(row + DIM + group[None, :], spread.to(dtype), mask=present[:, None] & (group < SPREAD)[None, :])
