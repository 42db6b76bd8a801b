"""Products of float32 are exact, or in TF32 where PyTorch was told that this will do."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton import test_decode, test_prefill
from tests.attention.triton.calls import called

from llama_surgery.attention.impl.triton.decode.launch import decode
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.config import SurgeryConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

CONFIG = SurgeryConfig(chunk_size=128, page_size=32, window=64, tile=32, theta=0.02)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def check(rough: torch.Tensor, exact: torch.Tensor, most: float = 4e-3) -> None:
    """TF32 keeps ten bits of a factor. Were nothing lost at all, it had not been used."""
    assert torch.isfinite(rough).all()
    assert 1e-5 < (rough - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("summary", ["none", "page"])
@pytest.mark.parametrize("theta", [0.0, 0.02])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prompts(dim: int, theta: float, summary: str, device: torch.device) -> None:
    config = dataclasses.replace(CONFIG, theta=theta, summary=summary)
    case = test_prefill.Case(1500, 1530, 4, dim, softcap=20.0 if dim == 128 else None)
    given = test_prefill.inputs(case, config, device)
    exact = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
    with tf32():
        rough = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
    again = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
    pages, wanted = (sum(int(plan.counts.sum()) for plan in result.plans) for result in (rough, exact))
    assert abs(pages - wanted) <= 0.002 * wanted
    # Where a share is close to θ, single rows see other pages.
    check(rough.out, exact.out, 4e-3 if theta == 0 else 5e-2)
    assert torch.equal(again.out, exact.out)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dim", [64, 256])
def test_steps(dim: int, rows: int, device: torch.device) -> None:
    config = dataclasses.replace(CONFIG, theta_decode=0.0)
    case = test_decode.Case((3000, 700), rows, 4, 2, dim, dim)
    texts = test_decode.make_texts(case, config, device)
    cache = test_decode.loaded_cache(texts, case, config)
    test_decode.append(cache, texts)
    queries = torch.cat([text.queries for text in texts])
    exact = decode(queries, cache)
    with tf32():
        rough = decode(queries, cache)
    assert torch.equal(rough.opened, exact.opened)
    check(rough.out, exact.out)
