"""Learned corrections: what they do to scores, budgets and order, and that none of them changes nothing."""

import dataclasses
import math

import pytest
import torch

from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.attention.api import attend
from llama_surgery.attention.executor import build_layout
from llama_surgery.topology.layout import moments_of
from llama_surgery.topology.plan import page_mask
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import Scorer
from llama_surgery.topology.tree import tree_order

CONFIG = SurgeryConfig(
    chunk_size=32,
    page_size=8,
    window=16,
    tile=8,
    theta=0.08,
    theta_decode=0.08,
    backend="gather",
)
STREAMS, KV_HEADS, GROUP, DIM, ROWS = 4, 2, 2, 6, 128


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def neutral() -> PageRouter:
    ones = torch.ones(KV_HEADS, GROUP, DIM)
    return PageRouter(torch.zeros(KV_HEADS, GROUP), ones, ones, torch.eye(DIM).repeat(KV_HEADS, 1, 1))


def run(router: PageRouter | None, config: SurgeryConfig = CONFIG):
    queries, keys = normal(STREAMS, GROUP, ROWS, DIM), 2 * normal(STREAMS, ROWS, DIM, seed=1)
    layout = build_layout(keys, keys, config, router)
    return attend(queries, keys, keys, layout, config=config, start=0, router=router)


def test_neutral_corrections_change_nothing() -> None:
    plain, routed = run(None), run(neutral())
    assert torch.equal(plain.out, routed.out)
    for before, after in zip(plain.plans, routed.plans, strict=True):
        assert torch.equal(before.pages, after.pages) and torch.equal(before.first_open, after.first_open)


def test_an_offset_is_a_threshold_of_its_own() -> None:
    """All heads raised alike: the plan of a higher θ. One head raised: fewer pages for it alone."""
    shift = math.log(2.0)
    raised = run(dataclasses.replace(neutral(), offset=torch.full((KV_HEADS, GROUP), shift)))
    higher = run(None, dataclasses.replace(CONFIG, theta=0.16, theta_decode=0.16))
    for before, after in zip(higher.plans, raised.plans, strict=True):
        assert torch.equal(before.counts, after.counts)
    offset = torch.zeros(KV_HEADS, GROUP)
    offset[1, 0] = 50.0
    one = run(dataclasses.replace(neutral(), offset=offset))
    for before, after in zip(run(None).plans, one.plans, strict=True):
        pages = int(before.block.closed * CONFIG.pages_per_chunk)
        was, now = (page_mask(plan, pages).unflatten(0, (-1, KV_HEADS, GROUP)) for plan in (before, after))
        alike = torch.ones(KV_HEADS, GROUP, dtype=torch.bool)
        alike[1, 0] = False
        assert torch.equal(was[:, alike], now[:, alike])
        assert (was[:, 1, 0] >= now[:, 1, 0]).all() and was[:, 1, 0].sum() > now[:, 1, 0].sum()


def test_weights_of_channels_by_hand() -> None:
    query = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]], dtype=torch.float64).transpose(
        0, 1
    )  # two heads, one row
    moments = moments_of(
        torch.tensor([[[0.0, 2.0], [2.0, 2.0]] * 2], dtype=torch.float64), 4
    )  # mean (1, 2), var (1, 0)
    router = PageRouter(
        mean_weight=torch.tensor([[[2.0, 1.0], [1.0, 0.5]]]),
        variance_weight=torch.tensor([[[1.0, 1.0], [3.0, 1.0]]]),
    )
    scores, weights = (x.flatten() for x in Scorer(1.0, None, router)(query, moments))
    means = torch.tensor([math.log(4) + 2 * 1 + 2 * 2, math.log(4) + 3 * 1 - 0.5 * 2], dtype=torch.float64)
    variances = torch.tensor([1.0, 27.0], dtype=torch.float64)
    most = math.log(4)
    beyond = most + math.sqrt(2 * most) * (math.sqrt(1 + 27.0) - math.sqrt(1 + 2 * most))
    reached = [0.5, beyond]  # of half a variance of 1, and of 27
    torch.testing.assert_close(scores, means + torch.tensor(reached, dtype=torch.float64))
    torch.testing.assert_close(weights, means + (1 + variances).sqrt() - 1)


def test_the_tree_sees_mapped_keys_and_the_cache_those_of_the_model() -> None:
    keys, key_map = normal(STREAMS, 64, DIM), normal(KV_HEADS, DIM, DIM, seed=2)
    layout = build_layout(keys, keys, CONFIG, PageRouter(key_map=key_map))
    mapped = torch.stack([keys[s] @ key_map[s % KV_HEADS].T for s in range(STREAMS)])
    order = tree_order(mapped.unflatten(1, (2, 32)), CONFIG.page_size)
    assert torch.equal(layout.order.long(), order)
    assert torch.equal(
        layout.keys.sort(1).values, keys.unflatten(1, (2, 32)).flatten(1, 2)[:, :].sort(1).values
    )
    assert not torch.equal(layout.order, build_layout(keys, keys, CONFIG).order)


def test_the_tree_sees_weighted_keys() -> None:
    keys, weight = normal(STREAMS, 64, DIM), normal(KV_HEADS, DIM, seed=2).abs()
    layout = build_layout(keys, keys, CONFIG, PageRouter(key_weight=weight))
    mapped = build_layout(keys, keys, CONFIG, PageRouter(key_map=torch.diag_embed(weight)))
    assert torch.equal(layout.order, mapped.order)
    assert torch.equal(layout.keys, mapped.keys)


def test_everything_open_is_dense_whatever_was_learned() -> None:
    router = PageRouter(
        normal(KV_HEADS, GROUP),
        normal(KV_HEADS, GROUP, DIM),
        normal(KV_HEADS, GROUP, DIM),
        normal(KV_HEADS, DIM, DIM),
    )
    routed = run(router, dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0))
    dense = run(None, dataclasses.replace(CONFIG, dense_until=1 << 20))
    torch.testing.assert_close(routed.out, dense.out)


@pytest.mark.parametrize(
    ("router", "told"),
    [
        (PageRouter(offset=torch.zeros(2, 3)), r"offset \(2, 3\)"),
        (PageRouter(mean_weight=torch.ones(2, 2, 5)), "mean_weight"),
        (PageRouter(key_map=torch.full((2, 6, 6), torch.nan)), "NaN"),
    ],
)
def test_corrections_that_do_not_fit_are_refused(router: PageRouter, told: str) -> None:
    with pytest.raises(SurgeryError, match=told):
        router.check(KV_HEADS, GROUP, DIM)
