"""Layout by kernels against the plain one: orders, moments, odd sizes."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.attention.impl.triton.layout.launch import build_layout
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology import layout as plain
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.tree import principal_direction

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16)


def states(chunks: int, dim: int, size: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Keys with a large mean and one wide channel, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, chunks * size, dim, generator=generator)
    keys[..., dim // 3] *= 3
    return (keys + 2 * torch.randn(2, 1, dim, generator=generator)).to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [16, 40])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG),
        dataclasses.replace(CONFIG, page_size=8),
        dataclasses.replace(CONFIG),
        SurgeryConfig(chunk_size=96, page_size=12, window=12, tile=12),
        SurgeryConfig(chunk_size=32, page_size=32, window=32, tile=32),
    ],
)
def test_layout_is_the_plain_one(config: SurgeryConfig, dim: int, device: torch.device) -> None:
    keys = states(2, dim, config.chunk_size, device)
    values = states(2, 24, config.chunk_size, device, 1)
    got, expected = build_layout(keys, values, config), plain.build_layout(keys, values, config)
    assert torch.equal(got.order, expected.order)
    assert torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)
    assert got.moments.size == expected.moments.size
    for name in ("mean", "variance"):
        torch.testing.assert_close(
            getattr(got.moments, name), getattr(expected.moments, name), rtol=1e-5, atol=1e-5
        )


def test_large_chunks_are_split_as_plainly(device: torch.device) -> None:
    config = SurgeryConfig()
    keys = states(1, 128, config.chunk_size, device)
    for given in (keys, keys.half()):
        got, expected = (build(given, given, config).order for build in (build_layout, plain.build_layout))
        assert torch.equal(got, expected)


def test_wide_heads_are_split_as_plainly(device: torch.device) -> None:
    keys = states(2, 144, CONFIG.chunk_size, device)
    got, expected = build_layout(keys, keys, CONFIG), plain.build_layout(keys, keys, CONFIG)
    assert torch.equal(got.order, expected.order) and torch.equal(got.keys, expected.keys)


@pytest.mark.usefixtures("poisoned")
def test_the_tree_sees_mapped_keys(device: torch.device) -> None:
    """Two sequences of two KV heads, each of which has a map of its own."""
    keys = torch.cat([states(1, 16, CONFIG.chunk_size, device, seed) for seed in (0, 1)])
    router = PageRouter(key_map=states(1, 16, 16, device, 2))
    got, expected = (build(keys, keys, CONFIG, router) for build in (build_layout, plain.build_layout))
    assert torch.equal(got.order, expected.order) and torch.equal(got.keys, expected.keys)
    assert not torch.equal(got.order, build_layout(keys, keys, CONFIG).order)
    half = build_layout(keys.half(), keys.half(), CONFIG, router).order
    assert (half == got.order).float().mean() > 0.9  # but for keys that fall close to a median


def test_strided_views_give_the_same_layout(device: torch.device) -> None:
    keys = states(2, 32, CONFIG.chunk_size, device)
    view = torch.stack((keys, keys.flip(-1)), 2)[:, :, 0]
    assert not view.is_contiguous()
    assert torch.equal(build_layout(view, view, CONFIG).keys, build_layout(keys, keys, CONFIG).keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_keys_stay_in_order(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter does not know bfloat16")
    large = SurgeryConfig(chunk_size=256, page_size=64, window=32, tile=16)
    for config in (CONFIG, large):
        keys = torch.full((1, config.chunk_size, 20), 0.7, dtype=dtype, device=device)
        order = build_layout(keys, keys, config).order
        assert order.flatten().tolist() == list(range(config.chunk_size))


def test_ties_are_broken_by_position_and_splits_follow_the_direction(device: torch.device) -> None:
    keys = states(4, 16, CONFIG.chunk_size, device).round()
    order = build_layout(keys, keys, CONFIG).order.long()
    for stream in range(2):
        for chunk in range(4):
            of_chunk = keys[stream].double().unflatten(0, (4, -1))[chunk]
            split = order[stream, chunk]
            assert sorted(split.tolist()) == list(range(64))
            assert (split.unflatten(0, (-1, 8)).diff() > 0).all()
            centred = of_chunk - of_chunk.mean(0)
            along = (centred @ principal_direction(centred))[split].unflatten(0, (2, -1))
            assert along[0].max() <= along[1].min() + 1e-5


@pytest.mark.parametrize("mapped", [None, "key_map", "key_weight"])
def test_a_chunk_does_not_see_its_neighbours(mapped: str | None, device: torch.device) -> None:
    keys = states(3, 24, CONFIG.chunk_size, device)
    part = states(1, 24, 24, device, 2)
    router = (
        None if mapped is None else PageRouter(**{mapped: part if mapped == "key_map" else part[:, 0].abs()})
    )
    whole = build_layout(keys, keys, CONFIG, router)
    alone = build_layout(keys[:, 64:128], keys[:, 64:128], CONFIG, router)
    assert torch.equal(whole.order[:, 1:2], alone.order)
    assert torch.equal(whole.moments.variance[:, 4:8], alone.moments.variance)


def test_weighted_keys_are_sorted_as_plain_layout_sorts_them(device: torch.device) -> None:
    keys = states(6, 24, CONFIG.chunk_size, device)
    router = PageRouter(key_weight=0.1 + torch.rand(2, 24, device=device))
    ours, theirs = build_layout(keys, keys, CONFIG, router), plain.build_layout(keys, keys, CONFIG, router)
    assert torch.equal(ours.order, theirs.order)
    assert not torch.equal(ours.order, build_layout(keys, keys, CONFIG).order)
    with pytest.raises(SurgeryError, match="key_weight"):
        build_layout(keys, keys, CONFIG, PageRouter(key_weight=torch.ones(2, 23, device=device)))
