"""The quickened interpreter is in use, and does what Triton's own does."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled, not interpreted"
)


@triton.jit
def _total(values):
    return tl.sum(values[:, None] * values[None, :])


@triton.jit
def combine_kernel(source, target, factor, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    values = tl.load(source + place) * factor
    tl.store(target + place, values + _total(values) * tl.full([1], 1, tl.int32))


@triton.jit
def _farther(value, place, other, elsewhere):
    further = tl.abs(other) > tl.abs(value)
    return tl.where(further, other, value), tl.where(further, elsewhere, place)


@triton.jit
def farthest_kernel(source, values, places, ROWS: tl.constexpr, SIZE: tl.constexpr, KEEP: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, SIZE)[None, :]
    given = tl.load(source + row * SIZE + column)
    value, place = tl.reduce((given, column + tl.zeros_like(row)), 1, _farther, keep_dims=KEEP)
    if KEEP:
        tl.store(values + row, value)
        tl.store(places + row, place)
    else:
        tl.store(values + tl.arange(0, ROWS), value)
        tl.store(places + tl.arange(0, ROWS), place)


@triton.jit
def misfit_kernel(target):
    tl.store(target + tl.arange(0, 4), tl.arange(0, 4) + tl.arange(0, 2))


def test_it_is_in_use() -> None:
    assert interpreter._patch_lang.__module__ == "tests.interpreter"


@pytest.mark.parametrize("kind", [torch.int32, torch.float32])
def test_results(kind: torch.dtype) -> None:
    source = torch.arange(8, dtype=kind)
    for factor in (1, 3):
        target = torch.empty_like(source)
        combine_kernel[(1,)](source, target, factor, SIZE=8)
        scaled = source * factor
        assert torch.equal(target, scaled + scaled.sum() ** 2)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_reductions_by_a_function_of_their_own(rows: int, keep: bool) -> None:
    source = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    values, places = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    farthest_kernel[(1,)](source, values, places, ROWS=rows, SIZE=8, KEEP=keep)
    want = source.abs().argmax(1)
    assert torch.equal(places.long(), want) and torch.equal(values, source[torch.arange(rows), want])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InterpreterError, match="incompatible dimensions at index 0: 4 and 2"):
        misfit_kernel[(1,)](torch.zeros(4, dtype=torch.int32))
