"""What kernels score pages by, against the plain formula."""

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.attention.heard import rounded_moments
from llama_surgery.attention.impl.triton.job import LARGEST_SQUARE, moments_from, page_features
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.layout import moments_of, pool_channels


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dim", "pool"), [(16, 1), (40, 1), (64, 8), (80, 8), (24, 2)])
def test_features_are_moments_pooled(dim: int, pool: int, device: torch.device) -> None:
    keys = torch.randn(2, 6 * 17, dim, device=device)
    keys[0, :6, 3] = 1e4  # a variance beyond what half precision holds
    moments = moments_of(keys, 6)
    got = page_features(moments, torch.float32, pool)
    spread = (pool_channels(moments.variance, pool) * (0.5 / pool)).clamp_max(LARGEST_SQUARE)
    mean, half = got.split((dim, dim // pool), -1)
    torch.testing.assert_close(mean, moments.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, spread, rtol=1e-4, atol=1e-5)


def test_moments_come_back(device: torch.device) -> None:
    config = SurgeryConfig(variance_pool=4)
    moments = moments_of(torch.randn(2, 64, 16, device=device), 8)
    back = moments_from(page_features(moments, torch.float32, 4), config)
    torch.testing.assert_close(back.mean, moments.mean)
    torch.testing.assert_close(pool_channels(back.variance, 4), pool_channels(moments.variance, 4))
    with pytest.raises(SurgeryError, match="variance_pool=6 does not divide head_dim=16"):
        page_features(moments, torch.float32, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", [1, 4])
def test_plain_pytorch_rounds_as_the_kernel_does(dtype: torch.dtype, pool: int, device: torch.device) -> None:
    config = SurgeryConfig(variance_pool=pool)
    keys = torch.randn(2, 64, 16, device=device)
    keys[0, :8, 3] = 1e4 * torch.arange(8, device=device)
    moments = moments_of(keys, 8)
    kept = moments_from(page_features(moments, dtype, pool), config)
    rounded = rounded_moments(moments, config, dtype)
    if dtype == torch.float16 or keys.is_cuda:  # the interpreter cuts bfloat16 off where a GPU rounds
        assert torch.equal(rounded.mean, kept.mean)
    digit = torch.finfo(dtype).eps  # sums of several channels may be rounded either way
    torch.testing.assert_close(rounded.mean, kept.mean, rtol=digit, atol=0)
    torch.testing.assert_close(rounded.variance, kept.variance, rtol=digit, atol=0)
