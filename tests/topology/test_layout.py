"""Chunks in tree order and the moments of their pages."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import (
    build_layout,
    moments_of,
    reorder,
    restore,
)


@st.composite
def cases(draw):
    depth, page = draw(st.sampled_from([(2, 4), (2, 6), (1, 10), (0, 8)]))
    config = SurgeryConfig(
        chunk_size=page * 2**depth,
        page_size=page,
        window=0,
        tile=1,
        theta=0.01,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)) * config.chunk_size)
    keys = 1 + torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    return keys, values, config


@given(cases())
def test_moments_are_those_of_the_pages_keys(case):
    keys, values, config = case
    layout = build_layout(keys, values, config)
    pages = layout.keys.unflatten(1, (-1, config.page_size))
    mean = pages.sum(2) / config.page_size
    variance = (pages - mean.unsqueeze(2)).square().sum(2) / config.page_size
    torch.testing.assert_close(layout.moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layout.moments.variance, variance, rtol=1e-12, atol=1e-12)
    assert layout.moments.size == config.page_size
    by_page = layout.values.unflatten(1, (-1, config.page_size))
    torch.testing.assert_close(layout.mean_values, by_page.mean(2), rtol=1e-12, atol=1e-12)


@given(cases())
def test_restore_undoes_reorder(case):
    keys, values, config = case
    layout = build_layout(keys, values, config)
    assert torch.equal(restore(layout.keys, layout.order), keys)
    assert torch.equal(restore(layout.values, layout.order), values)
    assert torch.equal(reorder(restore(layout.keys, layout.order), layout.order), layout.keys)


@given(cases())
def test_a_chunk_is_laid_out_by_its_own_keys_alone(case):
    keys, values, config = case
    whole, pieces = build_layout(keys, values, config), []
    for start in range(0, keys.shape[1], config.chunk_size):
        span = slice(start, start + config.chunk_size)
        pieces.append(build_layout(keys[:, span], values[:, span], config))
    assert len(pieces) == whole.chunks == keys.shape[1] // config.chunk_size
    for of in (
        lambda layout: layout.keys,
        lambda layout: layout.values,
        lambda layout: layout.order,
        lambda layout: layout.moments.mean,
        lambda layout: layout.moments.variance,
        lambda layout: layout.mean_values,
    ):
        torch.testing.assert_close(of(whole), torch.cat([of(x) for x in pieces], 1), rtol=1e-14, atol=1e-14)


@given(cases())
def test_the_sink_page_holds_position_zero(case):
    keys, values, config = case
    layout = build_layout(keys, values, config)
    for stream, page in enumerate(layout.sink_pages(config.page_size).tolist()):
        held = layout.order[stream, 0, page * config.page_size : (page + 1) * config.page_size]
        assert 0 in held.tolist()


def test_moments_of_half_precision_keys_are_kept_in_float32():
    moments = moments_of(torch.randn(1, 8, 3).bfloat16(), 4)
    assert moments.mean.dtype == moments.variance.dtype == torch.float32


def test_values_may_have_another_width_than_keys():
    config = SurgeryConfig(chunk_size=8, page_size=4, window=0, tile=1, theta=0.1)
    layout = build_layout(torch.randn(1, 8, 3), torch.randn(1, 8, 7), config)
    assert layout.keys.shape == (1, 8, 3) and layout.values.shape == (1, 8, 7)
