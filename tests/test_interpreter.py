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


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InterpreterError, match="incompatible dimensions at index 0: 4 and 2"):
        misfit_kernel[(1,)](torch.zeros(4, dtype=torch.int32))
