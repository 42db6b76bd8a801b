"""Budgets by head: what they are found from, and what they come to."""

import dataclasses
import math

import pytest
import torch
from tests.surgery.tiny import SPARSE, build, logits, tokens

from llama_surgery import is_operated, operated, statistics
from llama_surgery.surgery.head_budgets import THETAS, _allocate, _gradients, head_budgets
from llama_surgery.surgery.operation import routers_of
from llama_surgery.topology.router import PageRouter

LENGTH = 320


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_a_further_pair_is_worth_the_same_in_all_heads(density: float) -> None:
    """Harm that falls with a power of what is read: then by how much is known in closed form."""
    theta = torch.tensor(THETAS, dtype=torch.float64)
    size = torch.tensor([1.0, 4.0, 0.25, 30.0], dtype=torch.float64)[:, None]
    read = 0.02 / theta.sqrt().expand(4, -1)
    harm = size / read
    log_theta = _allocate(harm, read, density)
    reads = 0.02 / (0.5 * log_theta).exp()
    assert float(reads.mean()) == pytest.approx(density, rel=0.05)
    free = (log_theta > math.log(THETAS[-1]) + 0.01) & (log_theta < math.log(THETAS[0]) - 0.01)
    worth = (size[:, 0] / reads.square())[free]
    assert len(worth) >= 2 and float(worth.max() / worth.min()) < 1.3


def test_heads_without_harm_read_least() -> None:
    read = torch.tensor([[0.01, 0.02, 0.04, 0.08, 0.16, 0.3]] * 2, dtype=torch.float64)
    harm = torch.stack((torch.zeros(6, dtype=torch.float64), read[0].reciprocal()))
    still, busy = _allocate(harm, read, 0.06).exp().tolist()
    assert still == pytest.approx(THETAS[0]) and busy < THETAS[2]


def test_gradients_leave_a_model_as_it_was() -> None:
    model = build("Llama")
    ids = tokens(1, LENGTH)
    before = logits(model, ids)
    with torch.no_grad():
        found = _gradients(model, ids)
    assert {i: g.shape for i, g in found.items()} == {0: (4,), 1: (4,)}
    assert all((g > 0).all() and g.isfinite().all() for g in found.values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "density"), [("Llama", 0.15), ("Gemma2", 0.15), ("GptOss", 0.4)])
def test_budgets_read_about_the_density_and_keep_the_metric(kind: str, density: float) -> None:
    model, ids = build(kind, dtype=torch.float32), tokens(2, LENGTH)
    config = dataclasses.replace(SPARSE, theta_decode=0.0)
    with operated(model, config):
        metric = routers_of(model)
    budgets = head_budgets(model, ids, config, metric, density)
    assert not is_operated(model) and budgets.routers.keys() == metric.keys()
    offsets = torch.cat([router.offset.flatten() for router in budgets.routers.values()])
    assert float(offsets.mean()) == pytest.approx(0, abs=1e-6) and float(offsets.std()) > 0.01
    for index, router in budgets.routers.items():
        assert torch.equal(router.key_weight, metric[index].key_weight)
    found = dataclasses.replace(config, theta=budgets.theta)
    with operated(model, found, routers=budgets.routers), torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)
        assert statistics(model).far_density == pytest.approx(density, rel=0.35)


def test_budgets_given_before_are_not_counted_in() -> None:
    model, ids = build("Llama"), tokens(1, LENGTH)
    given = {i: PageRouter(offset=torch.randn(2, 2)) for i in (0, 1)}
    one, other = (head_budgets(model, ids, SPARSE, routers, 0.15) for routers in (given, {}))
    assert one.theta == other.theta
    assert all(torch.equal(one.routers[i].offset, other.routers[i].offset) for i in (0, 1))
