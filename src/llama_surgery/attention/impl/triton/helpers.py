"""Small pieces that the kernels share. Logits and log-sum-exps inside kernels are in log2 units."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from llama_surgery.config import FALL, SurgeryConfig
from llama_surgery.errors import SurgeryError

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: float32 products of layout and gradients, whatever PyTorch allows: an order of keys should not hang on it.
EXACT = tl.constexpr("ieee")

_FALL = tl.constexpr(FALL)

#: Stands for "nothing seen yet" in running maxima: finite, so that differences never give NaN.
FLOOR = tl.constexpr(-1.0e30)

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
                "smaller pages (page_size), smaller tiles (tile), a type of 16 bits or backend='gather' take "
                "less."
            ) from error


def exact_products(dtype: torch.dtype) -> bool:
    """Are products of this dtype to be made without rounding factors?

    Those of float32, unless PyTorch's own may round them to TF32: after
    ``torch.set_float32_matmul_precision("high")``. On a matrix unit that is many times faster.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def pad_to_power(size: int) -> int:
    """The next power of two, at least 16: what matrix tiles are made of."""
    return max(16, triton.next_power_of_2(size))


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


def bar_of(config: SurgeryConfig, tile: int) -> tuple[float, float]:
    """What :func:`bar_at` takes: log2 of θ, and of the position where it begins to fall, inf if nowhere."""
    theta, length = config.theta_for(tile), config.theta_length
    return math.log2(theta) if theta > 0 else -math.inf, math.log2(length) if length else math.inf


@triton.jit
def bar_at(position, log2_bar, log2_from):
    """log2 of θ for rows at ``position``: :func:`~llama_surgery.topology.selection.log_theta`."""
    beyond = tl.log2(tl.maximum(position, 1).to(tl.float32)) - log2_from
    return log2_bar - _FALL * tl.maximum(beyond, 0.0)


@triton.jit
def of_piece(pieces_ptr, tile, FIELD: tl.constexpr, given):
    """``given``, or with ``pieces_ptr`` a field of a tile's row of a :class:`~.pieces.PieceTable`."""
    if pieces_ptr is None:
        return given
    else:
        return tl.load(pieces_ptr + tile * 8 + FIELD)


@triton.jit
def first_slot(page, blocks_ptr, block_slots, CHUNK: tl.constexpr, PAGE: tl.constexpr):
    """Where pages begin among the keys: chunks follow each other or, with ``blocks_ptr`` (chunks,) int64, are
    blocks that begin ``block_slots`` apart."""
    if blocks_ptr is None:
        return page * PAGE
    else:
        per_chunk: tl.constexpr = CHUNK // PAGE
        block = tl.load(blocks_ptr + page // per_chunk).to(tl.int32)
        return block * block_slots + page % per_chunk * PAGE


@triton.jit
def load_rows(base, rows, row_stride, present, DIM: tl.constexpr, DIM_PAD: tl.constexpr, CHECK: tl.constexpr):
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
def softmax_step(acc, total, top, products, factor, values, seen, BY_ROW: tl.constexpr):
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
