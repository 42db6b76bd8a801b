"""Scores, shares and the pages that rows open."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import query_blocks
from llama_surgery.topology.layout import Moments, build_layout, moments_of
from llama_surgery.topology.plan import page_mask
from llama_surgery.topology.selection import Scorer, log_theta, row_totals, select

DIM = 8
SCALE = DIM**-0.5
CONFIG = SurgeryConfig(chunk_size=16, page_size=4, window=8, tile=8, theta=0.05, theta_decode=0.05)


@dataclasses.dataclass
class Case:
    """Rows of one block with the chunks closed for them."""

    config: SurgeryConfig
    block: object
    queries: torch.Tensor
    layout: object
    near_lse: torch.Tensor
    sinks: torch.Tensor | None

    def plan(self, tile=None, **changes):
        case = dataclasses.replace(self, **changes)
        return select(
            case.queries,
            case.layout,
            case.near_lse,
            case.block,
            config=case.config,
            tile=case.config.tile if tile is None else tile,
            scorer=Scorer(SCALE),
            sink_logit=case.sinks,
        )

    @property
    def pages(self):
        return self.block.closed * self.config.pages_per_chunk

    @property
    def sink_pages(self):
        """(choosers,): the page of the slot that holds position 0."""
        pages = (self.layout.order[:, 0] == 0).nonzero()[:, 1] // self.config.page_size
        return pages.repeat_interleave(1 if self.config.tile == 1 else self.queries.shape[1])

    def mask(self, plan):
        return page_mask(plan, self.pages)


@st.composite
def cases(draw, **fixed):
    tile = draw(st.sampled_from([1, 4, 8]))
    theta = draw(st.sampled_from([0.0, 0.01, 0.05, 0.2]))
    options = {
        "tile": tile,
        "theta": theta,
        "theta_decode": theta,
    }
    config = dataclasses.replace(CONFIG, **{**options, **fixed})
    start = draw(st.integers(24, 70))
    stop = start + draw(st.integers(1, 30))
    blocks = [b for b in query_blocks(start, stop, config, config.tile) if b.closed]
    block = draw(st.sampled_from(blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    streams, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, keys = block.stop - block.start, (block.closed + 1) * config.chunk_size

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        config,
        block,
        2 * normal(streams, heads, rows, DIM),
        build_layout(2 * normal(streams, keys, DIM), normal(streams, keys, DIM), config),
        2 + normal(streams, heads, rows),
        normal(streams, heads) if draw(st.booleans()) else None,
    )


def reached(term, size):
    """What a variance term adds to the score of a page of ``size`` keys."""
    most = math.log(size)
    beyond = most + math.sqrt(2 * most) * (math.sqrt(1 + 2 * term) - math.sqrt(1 + 2 * most))
    return term if term < most else beyond


def slow_scores(case, stream, row, head):
    """Score and weight of every page for one row of one head, by the formulas of the design."""
    moments, scores, weights = case.layout.moments, [], []
    q = case.queries[stream, head, row]
    for page in range(case.pages):
        spread = SCALE**2 * float(q**2 @ moments.variance[stream, page])
        linear = math.log(case.config.page_size) + SCALE * float(q @ moments.mean[stream, page])
        scores.append(linear + reached(spread / 2, case.config.page_size))
        weights.append(linear + math.sqrt(1 + spread) - 1)
    return scores, weights


def slow_shares(case, stream, row):
    """Share of every page for one row, (heads, pages); in tiles of one row the largest over heads."""
    shares = []
    for head in range(case.queries.shape[1]):
        rest = [float(case.near_lse[stream, head, row])]
        if case.sinks is not None:
            rest.append(float(case.sinks[stream, head]))
        scores, weights = slow_scores(case, stream, row, head)
        total = torch.tensor(weights + rest).double().logsumexp(0)
        shares.append([math.exp(score - total) for score in scores])
    return shares if case.config.tile > 1 else [[max(column) for column in zip(*shares, strict=True)]]


@given(cases())
def test_a_row_opens_what_exceeds_theta_and_sees_what_rows_up_to_it_opened(case):
    block, config = case.block, case.config
    mask = case.mask(case.plan())
    sink = case.sink_pages
    opened = {}
    for stream in range(case.queries.shape[0]):
        for row, position in enumerate(range(block.start, block.stop)):
            by_head = slow_shares(case, stream, row)
            for head, shares in enumerate(by_head):
                chooser = stream * len(by_head) + head
                if position % config.tile == 0 or row == 0:
                    opened[chooser] = {int(sink[chooser])}
                opened[chooser] |= {page for page, share in enumerate(shares) if share > config.theta}
                assert set(mask[chooser, row].nonzero().flatten().tolist()) == opened[chooser]
    assert len(mask) == len(opened)


@given(cases(theta=0.0, theta_decode=0.0))
def test_theta_zero_opens_everything(case):
    assert case.mask(case.plan()).all()


@given(cases(), st.sampled_from([1e200, 1e300]))
def test_a_theta_beyond_all_scores_opens_the_sink_page_alone(case, theta):
    config = dataclasses.replace(case.config, theta=theta, theta_decode=theta)
    plan = case.plan(config=config)
    assert (plan.counts == 1).all() and (plan.first_open == 0).all()
    assert torch.equal(plan.pages[..., 0], case.sink_pages[:, None].expand(-1, plan.tiles))


@given(cases(), st.data())
def test_later_rows_never_change_what_earlier_rows_see(case, data):
    rows = case.queries.shape[2]
    changed = data.draw(st.integers(0, rows - 1))
    queries, near_lse = case.queries.clone(), case.near_lse.clone()
    queries[:, :, changed:] *= -3
    near_lse[:, :, changed:] -= 1
    before = case.mask(case.plan())
    after = case.mask(case.plan(queries=queries, near_lse=near_lse))
    assert torch.equal(before[:, :changed], after[:, :changed])


@given(cases())
def test_first_open_lies_in_the_block_and_the_sink_page_is_open_from_the_first_row(case):
    plan = case.plan()
    sink = case.sink_pages[:, None, None]
    is_sink = plan.pages == sink
    assert (is_sink.sum(-1) == 1).all() and (plan.first_open[is_sink] == 0).all()
    others = (plan.pages >= 0) & ~is_sink
    assert (plan.first_open[:, 0][others[:, 0]] >= plan.lead).all()
    last = (case.block.stop - 1) % plan.tile
    assert (plan.first_open[:, -1][others[:, -1]] <= last).all()


@given(st.integers(0, 2**31), st.sampled_from([None, 20.0]))
def test_a_score_is_the_log_sum_exp_to_second_order_for_small_keys(seed, softcap):
    """What is left out is of third order in the logits."""
    generator = torch.Generator().manual_seed(seed)
    # Corners of a box: their covariance is diagonal, as the score assumes of a page's keys.
    half = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    centre = torch.randn(3, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 1, 3, generator=generator, dtype=torch.float64)
    for size in (0.3, 0.1, 0.03, 0.01):
        keys = size * (centre + signs * half)
        score = Scorer(1.0, softcap)(query, moments_of(keys[None], 8))[0].item()
        logits = keys @ query[0, 0]
        largest = logits.abs().max().item()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        assert abs(score - logits.logsumexp(0).item()) <= 1.5 * largest**3 + 1e-12


@given(st.integers(0, 2**31))
def test_a_score_of_one_channel_is_the_exact_second_order_expansion(seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 16, 1, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 1, 1, generator=generator, dtype=torch.float64)
    score = Scorer(0.3)(query, moments_of(keys, 16))[0].item()
    x = 0.3 * (query[0, 0, 0] * keys[0, :, 0])
    expected = math.log(16) + x.mean().item() + reached(0.5 * x.var(correction=0).item(), 16)
    assert score == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("deviation", [0.5, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("size", [8, 32])
def test_a_score_is_what_samples_of_a_normal_distribution_weigh_or_somewhat_more(deviation, size):
    """½·v would promise e^128 of a deviation of 16."""
    moments = Moments(torch.zeros(1, 1, 1), torch.full((1, 1, 1), deviation**2), size)
    score = Scorer(1.0)(torch.ones(1, 1, 1), moments)[0].item()
    samples = deviation * torch.randn(20_000, size, generator=torch.Generator().manual_seed(0))
    expected = samples.logsumexp(-1).mean().item()
    assert expected - 0.02 <= score <= 1.45 * expected


@given(st.floats(0, 30))
def test_a_weight_is_little_below_that_of_two_groups_of_keys(apart):
    keys = torch.tensor([[-apart], [apart]], dtype=torch.float64).repeat_interleave(4, 0)
    weight = Scorer(1.0)(torch.ones(1, 1, 1, dtype=torch.float64), moments_of(keys[None], 8))[1].item()
    assert weight - 1e-6 <= keys.logsumexp(0).item() <= weight + 1 - math.log(2)


def test_weights_have_finite_slopes_where_keys_are_equal():
    query = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    Scorer(1.0)(query, moments_of(torch.ones(1, 8, 1, dtype=torch.float64), 8))[1].sum().backward()
    assert query.grad.isfinite().all()


def test_a_wide_page_takes_no_share_from_others():
    """Its score promises e^20 times what there is on its keys."""
    keys = torch.zeros(1, 32, 1, dtype=torch.float64)
    keys[0, :16, 0] = -20.0
    keys[0, 8:16, 0] = 20.0
    keys[0, 16:, 0] = 21.0
    query, near_lse = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    scores, weights = Scorer(1.0)(query, moments_of(keys, 16))
    exact = keys[0, :, 0].unflatten(0, (2, 16)).logsumexp(-1)
    assert scores[0, 0, 0] - exact[0] > 20
    totals = row_totals(weights.logsumexp(-1)[:, None], near_lse[:, None], None, Scorer(1.0))
    shares = (scores[:, None] - totals[..., None]).exp()
    assert shares[0, 0, 0, 0] > 1  # it is opened in any case
    assert exact.softmax(0)[1].item() <= shares[0, 0, 0, 1].item() <= 1.05 * exact.softmax(0)[1].item()


@given(st.integers(0, 2**31), st.booleans())
def test_shares_of_pages_of_equal_keys_are_exact_and_add_up(seed, with_sink):
    generator = torch.Generator().manual_seed(seed)
    page_keys = torch.randn(1, 5, DIM, generator=generator, dtype=torch.float64)
    keys = page_keys.repeat_interleave(4, 1)  # no variance inside a page: the score is exact
    near = torch.randn(1, 7, DIM, generator=generator, dtype=torch.float64)
    queries = torch.randn(1, 3, DIM, generator=generator, dtype=torch.float64)
    near_lse = (SCALE * queries @ near.transpose(1, 2)).logsumexp(-1)
    sink = torch.tensor([[0.7]], dtype=torch.float64) if with_sink else None
    scores, weights = Scorer(SCALE)(queries, moments_of(keys, 4))
    totals = row_totals(weights.logsumexp(-1)[:, None], near_lse[:, None], sink, Scorer(SCALE))
    shares = (scores[:, None] - totals[..., None]).exp()

    logits = SCALE * queries @ torch.cat((keys, near), 1).transpose(1, 2)
    if with_sink:
        logits = torch.cat((logits, sink.expand(1, 3, 1)), -1)
    exact = logits.softmax(-1)
    torch.testing.assert_close(shares[:, 0], exact[..., :20].unflatten(-1, (5, 4)).sum(-1))
    assert (shares.sum(-1) <= 1).all()


def test_theta_falls_with_the_position_beyond_its_length():
    config = dataclasses.replace(CONFIG, theta=0.5, theta_length=64)
    positions = torch.tensor([0, 63, 64, 128, 1024])
    found = log_theta(config, CONFIG.tile, positions).exp()
    torch.testing.assert_close(found, 0.5 * torch.tensor([1, 1, 1, 2**-0.75, 2**-3]))
    assert log_theta(dataclasses.replace(config, theta_length=0), CONFIG.tile, positions) == math.log(0.5)


def test_a_decode_step_uses_its_own_theta():
    config = dataclasses.replace(CONFIG, theta=100.0, theta_decode=0.0)
    generator = torch.Generator().manual_seed(0)
    layout = build_layout(*torch.randn(2, 1, 32, DIM, generator=generator), config)
    (block,) = query_blocks(40, 41, config, 1)
    arguments = (torch.randn(1, 2, 1, DIM, generator=generator), layout, torch.zeros(1, 2, 1), block)
    scorer = Scorer(SCALE)
    assert select(*arguments, config=config, tile=1, scorer=scorer).counts.tolist() == [[8]]
    assert select(*arguments, config=config, tile=8, scorer=scorer).counts.tolist() == [[1], [1]]
