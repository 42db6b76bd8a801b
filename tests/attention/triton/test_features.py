"""What kernels score pages by, against the plain formula."""

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.attention.impl.triton.job import LARGEST_SQUARE, KeptMoments, page_features
from llama_surgery.topology.layout import moments_of


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [16, 24, 80])
def test_features_are_moments_side_by_side(dim: int, device: torch.device) -> None:
    keys = torch.randn(2, 6 * 17, dim, device=device)
    keys[0, :6, 3] = 1e4  # a variance beyond what half precision holds
    moments = moments_of(keys, 6)
    mean, half = page_features(moments, torch.float32).split(dim, -1)
    torch.testing.assert_close(mean, moments.mean, rtol=1e-5, atol=1e-5)
    spread = (0.5 * moments.variance).clamp_max(LARGEST_SQUARE)
    torch.testing.assert_close(half, spread, rtol=1e-4, atol=1e-5)


def test_moments_come_back(device: torch.device) -> None:
    moments = moments_of(torch.randn(2, 64, 16, device=device), 8)
    back = KeptMoments(page_features(moments, torch.float32), 8)
    torch.testing.assert_close(back.mean, moments.mean)
    torch.testing.assert_close(back.variance, moments.variance)
    assert back.size == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_pytorch_rounds_as_the_kernel_does(dtype: torch.dtype, device: torch.device) -> None:
    keys = torch.randn(2, 64, 16, device=device)
    keys[0, :8, 3] = 1e4 * torch.arange(8, device=device)
    moments = moments_of(keys, 8)
    kept = KeptMoments(page_features(moments, dtype), 8)
    mean, half = (
        x.to(dtype).float() for x in (moments.mean, (0.5 * moments.variance).clamp_max(LARGEST_SQUARE))
    )
    if dtype == torch.float16 or keys.is_cuda:  # the interpreter cuts bfloat16 off where a GPU rounds
        assert torch.equal(mean, kept.mean)
    digit = torch.finfo(dtype).eps
    torch.testing.assert_close(mean, kept.mean, rtol=digit, atol=0)
    torch.testing.assert_close(2 * half, kept.variance, rtol=digit, atol=0)
