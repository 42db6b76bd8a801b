"""Means that stand in for what a row does not see: worked by loop, and the laws they must keep."""

import dataclasses
import math

import pytest
import torch
from tests.learning.test_gates import corrections
from tests.surgery.tiny import SINGLE, SPARSE, in_pieces, llama, logits, tokens

from llama_surgery import SurgeryConfig, operated
from llama_surgery.attention.api import attend
from llama_surgery.attention.executor import build_layout
from llama_surgery.attention.summary import summary
from llama_surgery.learning.corrections import scorer_parameters
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.layout import moments_of
from llama_surgery.topology.plan import page_mask, plan_from_first_open
from llama_surgery.topology.selection import Scorer

CONFIG = SurgeryConfig(chunk_size=16, page_size=8, window=8, tile=4, theta=0.3, theta_decode=0.3)


def test_a_slow_loop_agrees() -> None:
    config, dim, rows = CONFIG, 5, 72
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, rows, dim, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(1, rows, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    layout = build_layout(2 * k[:, :64], v[:, :64], config)
    result = attend(q, 2 * k, v, layout, config=config, start=0, scale=1.0)
    last = result.plans[-1]
    by_head = page_mask(last, last.block.closed * 2)[:, -1]
    assert last.block.stop == rows and len(by_head) == 2 and not torch.equal(*by_head)
    for head in range(2):
        query, seen = q[0, head, -1], by_head[head]
        assert 0 < seen.sum() < len(seen)
        weights, values = [], []
        for position in range(last.block.closed * 16, rows):
            weights.append(float(query @ (2 * k[0, position])))
            values.append(v[0, position])
        for start in range(0, last.block.closed * 16, 8):
            keys, kept = layout.keys[0, start : start + 8], layout.values[0, start : start + 8]
            if seen[start // 8]:
                weights += [float(query @ key) for key in keys]
                values += list(kept)
                continue
            spread = float(query**2 @ keys.var(0, correction=0))
            weights.append(math.log(8) + float(query @ keys.mean(0)) + math.sqrt(1 + spread) - 1)
            values.append(kept.mean(0))
        share = torch.softmax(torch.tensor(weights, dtype=torch.float64), 0)
        torch.testing.assert_close(result.out[0, head, -1], share @ torch.stack(values))


def test_weights_are_little_below_what_two_groups_weigh_and_never_above_the_score() -> None:
    generator = torch.Generator().manual_seed(0)
    centre, apart, q = (torch.randn(1, n, 6, dtype=torch.float64, generator=generator) for n in (3, 3, 5))
    apart = apart * torch.eye(6, dtype=torch.float64)[:3]  # each pair differs in one channel
    keys = torch.stack((centre + apart, centre - apart), 2).flatten(1, 2)
    moments, scorer = moments_of(keys, 2), Scorer(2.0)
    exact = (2.0 * q @ keys.transpose(1, 2)).unflatten(-1, (3, 2)).logsumexp(-1)
    scores, weights = scorer(q, moments)
    assert ((weights - 1e-7 <= exact) & (exact <= weights + 1 - math.log(2))).all()
    assert (weights <= scores + 1e-7).all()
    scores, weights = Scorer(2.0, softcap=3.0)(q, moments)
    assert (weights <= scores + 1e-7).all()


def test_what_a_page_that_is_read_was_expected_to_weigh_does_not_matter() -> None:
    """Not even where it was e^200 times too much; rows that read all pages have nothing to stand in for."""
    config = SurgeryConfig(chunk_size=64, page_size=16, window=16, tile=8)
    states = torch.randn(2, 1, 64, 4, generator=torch.Generator().manual_seed(0))
    layout = build_layout(*states, config)
    weights = torch.randn(1, 1, 16, 4, requires_grad=True)
    expected = weights.detach().clone()
    expected[..., 1] += 200
    opened = torch.tensor([[[8, 0, 8, 8], [0, 0, 0, 0]]])  # page 1 by the first tile, all by the second
    plan = plan_from_first_open(opened, Block(80, 96, 1), 8)
    for given in (weights, expected):
        out, lse = summary(given, layout, plan, Scorer(1.0))
        unseen = given[0, 0, :8, [0, 2, 3]].detach()
        torch.testing.assert_close(lse[0, 0, :8], unseen.logsumexp(-1))
        assert layout.mean_values is not None
        torch.testing.assert_close(out[0, 0, :8], unseen.softmax(-1) @ layout.mean_values[0, [0, 2, 3]])
        assert (out[0, 0, 8:] == 0).all() and (lse[0, 0, 8:] < -1e30).all()
    total = torch.logaddexp(torch.zeros(16), summary(weights, layout, plan, Scorer(1.0))[1][0, 0])
    total.sum().backward()
    assert weights.grad is not None and torch.isfinite(weights.grad).all()


def test_everything_open_is_dense() -> None:
    model, ids = llama(), tokens(256)
    with operated(model, dataclasses.replace(SPARSE, theta=0.0, theta_decode=0.0)):
        ours = logits(model, ids)
    torch.testing.assert_close(ours, logits(model, ids), rtol=0, atol=1e-9)


def test_no_later_token_changes_an_earlier_logit() -> None:
    model, ids = llama(), tokens(240)
    with operated(model, SPARSE, routers=scorer_parameters(corrections(1))):
        whole = logits(model, ids)
        for stop in (200, 113, 37):
            torch.testing.assert_close(logits(model, ids[:stop]), whole[:, :stop], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "cuts"),
    [(SPARSE, [64, 136, 200]), (SINGLE, [1, 77, 131, 132])],
)
def test_cuts_do_not_matter(config, cuts) -> None:
    model, ids = llama(), tokens(240)
    with operated(model, config):
        torch.testing.assert_close(
            in_pieces(model, ids, cuts)[0], in_pieces(model, ids, [])[0], rtol=0, atol=1e-9
        )


def test_the_summary_brings_attention_closer_to_dense() -> None:
    """Values that vary little around a mean of their own page are what a mean can stand in for."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 64, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    v = k + 0.1 * torch.randn(2, 64, 6, dtype=torch.float64, generator=generator)
    errors = {}
    dense = attend(
        q[:, None], k, v, None, config=dataclasses.replace(CONFIG, dense_until=1 << 20), start=0
    ).out
    for kind in ("none", "page"):
        config = dataclasses.replace(CONFIG, summary=kind)
        out = attend(q[:, None], k, v, build_layout(k, v, config), config=config, start=0).out
        errors[kind] = float((out - dense).square().mean())
    assert errors["page"] < errors["none"]
