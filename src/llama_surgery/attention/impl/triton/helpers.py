"""Small pieces that the kernels share. Logits and log-sum-exps inside kernels are in log2 units."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from llama_surgery.errors import SurgeryError

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: float32 products of layout and gradients, whatever PyTorch allows: an order of keys should not hang on it.
EXACT = tl.constexpr("ieee")

#: Stands for "nothing seen yet" in running maxima: finite, so that differences never give NaN.
FLOOR = tl.constexpr(-1.0e30)

#: Least variance term: below it the root would have no slope (``topology.selection``).
LEAST = tl.constexpr(1e-8)

#: A list entry is ``page * ENTRY + first_open``; ``first_open`` fits because tiles hold at most 128 rows.
ENTRY = tl.constexpr(256)


@contextmanager
def launching(tensor: torch.Tensor) -> Iterator[None]:
    """Kernels launch on the current device: make it the tensor's.

    Raises:
        SurgeryError: A kernel needs more shared memory than the GPU has.
    """
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        try:
            yield
        except OutOfResources as error:
            raise SurgeryError(
                f"A kernel needs {error.required:,} bytes of {error.name}, and this GPU has {error.limit:,}: "
                "smaller pages (page_size), a type of 16 bits or backend='gather' take less."
            ) from error


def exact_products(dtype: torch.dtype) -> bool:
    """Are products of this dtype to be made without rounding factors?

    Those of float32, unless PyTorch's own may round them to TF32: after
    ``torch.set_float32_matmul_precision("high")``. On a matrix unit that is many times faster.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def product_options(states: torch.Tensor) -> dict[str, Any]:
    """Launch option of kernels whose products of ``states`` are as exact as :func:`exact_products` says.

    ``tl.dot`` takes TF32 wherever that is allowed, so it is forbidden here. Three TF32 products would be both
    fast and exact, but Triton 3.6 let them read beyond operands on Hopper (docs/log.md).
    """
    return {"allowed_dot_input_precisions": ("ieee",)} if exact_products(states.dtype) else {}


@triton.jit
def closed_chunks(first_position, CHUNK: tl.constexpr, WINDOW: tl.constexpr, dense_until):
    """Closed chunks of tiles whose first queries are at ``first_position``."""
    closed = tl.maximum(first_position - WINDOW, 0) // CHUNK
    return tl.where(first_position < dense_until, 0, closed)


@triton.jit
def load_rows(
    base,
    rows,
    row_stride,
    present,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Load (rows, DIM_PAD), zero beyond DIM and, with CHECK, where ``present`` is false."""
    column = tl.arange(0, DIM_PAD)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + column[None, :]
    if CHECK:
        if DIM == DIM_PAD:
            return tl.load(pointers, mask=present[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=present[:, None] & (column < DIM)[None, :], other=0.0)
    else:
        if DIM == DIM_PAD:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent that saturates instead of overflowing."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def cap_logits(products, scale, softcap, CAP: tl.constexpr):
    """Raw products of q and k to log2-unit logits under a cap; untouched without one.

    Without a cap the scaling is left to :func:`softmax_step`, where it folds into a multiply-add.
    """
    if CAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
        return products


@triton.jit
def softmax_step(
    acc,
    total,
    top,
    products,
    factor,
    values,
    seen,
    BY_ROW: tl.constexpr,
):
    """One step of the online softmax over a block of keys.

    Args:
        acc: (rows, values) running weighted sum.
        total: (rows,) running sum of weights, relative to ``top``.
        top: (rows,) running maximum.
        products: (rows, keys); logits are ``products * factor``, -inf where masked.
        factor: Positive factor to log2 units.
        values: (keys, values).
        seen: (rows,) bool, with BY_ROW: rows where it is false skip the block. It costs nothing per
            element: a hidden row's maximum stays and its weights are ``exp2(-inf)``.
    """
    peak = tl.max(products, 1) * factor
    if BY_ROW:
        peak = tl.where(seen, peak, FLOOR)
    new_top = tl.maximum(top, peak)
    shift = new_top
    if BY_ROW:
        shift = tl.where(seen, new_top, float("inf"))
    weights = tl.exp2(products * factor - shift[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc)
    return acc, total, new_top


@triton.jit
def sum_step(total, top, logits):
    """One step of an online log-sum-exp; ``logits`` (rows, columns) in log2 units, -inf where masked."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
    return total, new_top


@triton.jit
def score_factors(
    queries,
    scale,
    mean_weight_ptr,
    variance_weight_ptr,
    group,
    first_head,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_INSIDE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPREAD: tl.constexpr,
    SPREAD_PAD: tl.constexpr,
):
    """What multiplies means and variances in page scores, both in the queries' dtype.

    Args:
        queries: (rows, DIM_PAD), unscaled.
        scale: What queries are multiplied with before they are squared.
        mean_weight_ptr, variance_weight_ptr: Learned weights of channels (groups, HEADS, DIM) float32, or
            None.
        group, first_head: Rows are those of heads ``first_head … first_head + HEADS_BLOCK - 1`` of a group,
            one head after the other or, with HEAD_INSIDE, one query's heads after the other's.

    Returns:
        The queries (rows, DIM_PAD), and their squares, summed over the channels whose variances are pooled
        (rows, SPREAD_PAD); clamped where they would overflow in float16.
    """
    squares = queries.to(tl.float32) * scale
    squares = squares * squares
    if variance_weight_ptr is not None:
        squares = _weigh(
            squares, variance_weight_ptr, group, first_head, HEADS, HEADS_BLOCK, HEAD_INSIDE, DIM, DIM_PAD
        )
        squares = tl.maximum(squares, -6.0e4)
    squares = tl.minimum(squares, 6.0e4).to(queries.dtype)
    if SPREAD < DIM:
        # As a product with a matrix of ones and zeros: head dims need not be powers of two.
        channel = tl.arange(0, DIM_PAD)
        member = channel % (DIM // 2) // (DIM // (2 * SPREAD))
        member = (member[:, None] == tl.arange(0, SPREAD_PAD)[None, :]) & (channel < DIM)[:, None]
        summed = tl.dot(squares, member.to(squares.dtype))
        if variance_weight_ptr is not None:
            summed = tl.maximum(summed, -6.0e4)
        squares = tl.minimum(summed, 6.0e4).to(squares.dtype)
    if mean_weight_ptr is not None:
        weighted = _weigh(
            queries.to(tl.float32), mean_weight_ptr, group, first_head,
            HEADS, HEADS_BLOCK, HEAD_INSIDE, DIM, DIM_PAD,
        )  # fmt: skip
        queries = weighted.to(queries.dtype)
    return queries, squares


@triton.jit
def _weigh(
    states,
    weight_ptr,
    group,
    first_head,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_INSIDE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Multiply (rows, DIM_PAD) states with their heads' weights, which are loaded once for each head."""
    head = first_head + tl.arange(0, HEADS_BLOCK)
    weight = load_rows(weight_ptr, group * HEADS + head, DIM, head < HEADS, DIM, DIM_PAD, True)
    if HEADS_BLOCK == 1:
        return states * weight
    else:
        rows: tl.constexpr = states.shape[0] // HEADS_BLOCK
        if HEAD_INSIDE:
            by_head = tl.reshape(states, [rows, HEADS_BLOCK, DIM_PAD]) * weight[None, :, :]
        else:
            by_head = tl.reshape(states, [HEADS_BLOCK, rows, DIM_PAD]) * weight[:, None, :]
        return tl.reshape(by_head, [rows * HEADS_BLOCK, DIM_PAD])


@triton.jit
def ball_terms(queries, squares, mean, spread, scale, softcap, CAP: tl.constexpr):
    """Mean and variance term of page scores, (rows, balls) each, through the cap if there is one.

    Args:
        queries, squares: (rows, dim) and (rows, dim or groups) from :func:`score_factors`.
        mean: (balls, dim) the balls' μ.
        spread: (balls, dim) or (balls, groups) their ½·σ².
    """
    along = tl.dot(queries, tl.trans(mean))
    across = tl.dot(squares, tl.trans(spread))
    if CAP:
        slope = tanh(along * (scale / softcap))
        bend = 1.0 - slope * slope
        return slope * softcap, across * bend * bend
    else:
        return along * scale, across


@triton.jit
def bounded_term(across, SIZE: tl.constexpr):
    """A variance term, in log2 units, at most what SIZE keys can reach.

    ``topology.selection.bounded_variance_term``, with the outlier's part before the brackets.
    """
    if SIZE == 1:
        return across * LOG2E
    else:
        others: tl.constexpr = SIZE - 1
        root = tl.sqrt(tl.maximum(2.0 * others * across, LEAST)) * LOG2E
        rest = others * tl.exp2(root * (-SIZE / others))
        return tl.minimum(across * LOG2E, root + tl.log2((1.0 + rest) / SIZE))


@triton.jit
def ball_scores(along, across, log2_size, SIZE: tl.constexpr):
    """Scores in log2 units from :func:`ball_terms`; ``log2_size`` is the log2 of SIZE, the keys of a ball."""
    return along * LOG2E + bounded_term(across, SIZE) + log2_size


@triton.jit
def ball_weights(along, across, log2_size):
    """Log2 of what balls weigh where they stand in for their keys, from :func:`ball_terms`.

    The variance term is put in bounds, log cosh of its root: ``topology.selection.Scorer.weights``.
    """
    root = tl.sqrt(tl.maximum(2.0 * across, LEAST))
    return (along + root) * LOG2E + tl.log2(1.0 + tl.exp2(root * (-2.0 * LOG2E))) - 1.0 + log2_size


@triton.jit
def sum_of_balls(logits, present, PAGES: tl.constexpr, BALLS_PAD: tl.constexpr):
    """Log-sum-exp over the balls of each page, in log2 units: (rows, PAGES * BALLS_PAD) to (rows, PAGES).

    ``present`` (PAGES * BALLS_PAD,) says which balls there are.
    """
    logits = tl.where(present[None, :], logits, FLOOR)
    logits = tl.reshape(logits, [logits.shape[0], PAGES, BALLS_PAD])
    peak = tl.max(logits, 2)
    return peak + tl.log2(tl.sum(tl.exp2(logits - peak[:, :, None]), 2))
