"""Page scores inside kernels: what queries, means and variances give, in log2 units."""

import triton
import triton.language as tl

from llama_surgery.attention.impl.triton.helpers import LOG2E, load_rows, tanh


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
        The queries and their squares, (rows, DIM_PAD) each, clamped where they would overflow in float16.
    """
    squares = queries.to(tl.float32) * scale
    squares = squares * squares
    if variance_weight_ptr is not None:
        squares = _weigh(
            squares, variance_weight_ptr, group, first_head, HEADS, HEADS_BLOCK, HEAD_INSIDE, DIM, DIM_PAD
        )
        squares = tl.maximum(squares, -6.0e4)
    squares = tl.minimum(squares, 6.0e4).to(queries.dtype)
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
def page_terms(queries, squares, mean, spread, scale, softcap, CAP: tl.constexpr):
    """Mean and half the variance of pages' logits, (rows, pages) each, the mean in log2 units.

    Args:
        queries, squares: (rows, dim) from :func:`score_factors`.
        mean: (pages, dim) the pages' μ.
        spread: (pages, dim) their ½·σ².
    """
    along = tl.dot(queries, tl.trans(mean))
    across = tl.dot(squares, tl.trans(spread))
    if CAP:
        slope = tanh(along * (scale / softcap))
        bend = 1.0 - slope * slope
        return slope * (softcap * LOG2E), across * bend * bend
    else:
        return along * (scale * LOG2E), across


@triton.jit
def page_scores(along, across, log2_size):
    """Scores of pages and what they weigh, log2 of both, from :func:`page_terms`.

    The formulas are those of ``topology.selection.Scorer``; ``log2_size`` is the log2 of a page's number of
    keys.
    """
    most = log2_size / LOG2E
    root = tl.sqrt(tl.maximum(across, 0.0) * (2.0 * LOG2E * LOG2E) + LOG2E * LOG2E)
    slope = tl.sqrt(2.0 * most)
    reached = slope * root + (log2_size - LOG2E * slope * tl.sqrt(1.0 + 2.0 * most))
    variance = tl.where(across < most, across * LOG2E, reached)
    return along + (variance + log2_size), along + (root + (log2_size - LOG2E))
