"""Backends against each other and against plain masked softmax; what they say they read."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.topology.key_mask import key_mask

from llama_surgery.attention.api import attend
from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl import gather, reference
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import Block, causal_pairs, near_pairs
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.plan import plan_from_first_open, tiles_of

BASE = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.05, theta_decode=0.05)
#: Nothing stands in for what a row does not see.
BARE = dataclasses.replace(BASE, summary="none")


@dataclasses.dataclass
class Case:
    config: SurgeryConfig
    start: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    options: dict

    def run(self, backend, dtype=torch.float64, near=None):
        """``near``: how many near keys are handed over, all by default."""
        config = dataclasses.replace(self.config, backend=backend)
        keys, values = self.keys.to(dtype), self.values.to(dtype)
        full = keys.shape[1] // config.chunk_size * config.chunk_size
        layout = build_layout(keys[:, :full], values[:, :full], config) if full else None
        first = 0 if near is None else keys.shape[1] - near
        arguments = (self.queries.to(dtype), keys[:, first:], values[:, first:], layout)
        return attend(*arguments, config=config, start=self.start, **self.options), layout


@st.composite
def cases(draw, max_length=130, summaries=("none", "page")):
    tile = draw(st.sampled_from([1, 4, 8, 16]))
    theta = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 2.0]))
    config = dataclasses.replace(
        BASE,
        tile=tile,
        window=draw(st.sampled_from([0, 16, 32])),
        theta=theta,
        theta_decode=theta,
        theta_length=draw(st.sampled_from([0, 0, 1, 70])),
        dense_until=draw(st.sampled_from([0] * 4 + [64] * 2 + [256])),
        summary=draw(st.sampled_from(summaries)),
    )
    stop = draw(st.one_of(st.sampled_from([1, 63, 64, 65, 128]), st.integers(1, max_length)))
    start = draw(st.sampled_from([0, stop - 1, draw(st.integers(0, stop - 1))]))
    streams, heads = draw(st.integers(1, 2)), draw(st.integers(1, 8))
    dim, value_dim = draw(st.sampled_from([(8, 8), (5, 3), (16, 16)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options = {
        "tile": draw(st.sampled_from([1, None])),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "sink_logit": normal(streams, heads) if draw(st.booleans()) else None,
    }
    return Case(
        config,
        start,
        2 * normal(streams, heads, stop - start, dim),
        normal(streams, stop, dim),
        normal(streams, stop, value_dim),
        options,
    )


def executed_mask(case, result, layout):
    """(streams, heads, rows, keys) bool: what rows see, read from the plans."""
    streams, heads, rows, _ = case.queries.shape
    mask = torch.zeros(streams, heads, rows, case.keys.shape[1], dtype=torch.bool)
    position = torch.arange(case.start, case.start + rows)
    near_from = torch.zeros(rows, dtype=torch.int64)
    for plan in result.plans:
        inside = slice(plan.block.start - case.start, plan.block.stop - case.start)
        far = plan.block.closed * case.config.chunk_size
        near_from[inside] = far
        order = layout.order[:, : plan.block.closed]
        assert len(plan.counts) == streams * (1 if plan.tile == 1 else heads)
        by_chooser = key_mask(plan, order, case.config.page_size).unflatten(0, (streams, -1))
        mask[:, :, inside, :far] = by_chooser
    key = torch.arange(case.keys.shape[1])
    mask |= (key >= near_from[:, None]) & (key <= position[:, None])
    return mask


@given(cases())
def test_gather_equals_reference(case):
    got, _ = case.run("gather")
    expected, _ = case.run("reference")
    torch.testing.assert_close(got.out, expected.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-11, atol=1e-11)
    for one, other in zip(got.plans, expected.plans, strict=True):
        assert torch.equal(one.pages, other.pages)
        assert torch.equal(one.first_open, other.first_open)


@given(cases(summaries=("none",)), st.sampled_from(["reference", "gather"]))
def test_the_output_is_the_softmax_over_what_the_plans_show(case, backend):
    result, layout = case.run(backend)
    scale = case.options["scale"] or case.queries.shape[-1] ** -0.5
    logits = scale * case.queries @ case.keys[:, None].transpose(-1, -2)
    if case.options["softcap"]:
        logits = case.options["softcap"] * torch.tanh(logits / case.options["softcap"])
    logits = logits.masked_fill(~executed_mask(case, result, layout), -torch.inf)
    values = case.values[:, None]
    if case.options["sink_logit"] is not None:
        sink = case.options["sink_logit"][..., None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), -1)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))  # the sink has no value
    torch.testing.assert_close(result.out, logits.softmax(-1) @ values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.lse, logits.logsumexp(-1), rtol=1e-10, atol=1e-10)


@given(cases())
def test_reported_pairs_are_those_of_the_masks(case):
    result, layout = case.run("gather")
    mask = executed_mask(case, result, layout)
    far = sum(plan.visible_pairs(case.config.page_size) for plan in result.plans)
    if result.plans:
        far = far.unflatten(0, (len(mask), -1))  # of every head, or of all of them together
    stop, tile = case.keys.shape[1], case.options["tile"] or case.config.tile
    assert (mask.sum((2, 3)) == near_pairs(case.start, stop, case.config, tile) + far).all()
    assert causal_pairs(case.start, stop) == int((torch.arange(case.start, stop) + 1).sum())
    if case.config.theta == 0 or case.config.dense_until >= stop:
        assert int(mask[0, 0].sum()) == causal_pairs(case.start, stop)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("heads", [1, 3, 7])
def test_heads_open_pages_for_themselves_in_tiles_and_together_in_single_rows(backend, heads):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    case = Case(BASE, 0, 2 * normal(2, heads, 130, 8), normal(2, 130, 8), normal(2, 130, 8), {})
    last = dataclasses.replace(case, start=129, queries=case.queries[:, :, 129:], options={"tile": 1})
    alone, plans, together = [], [], []
    for head in range(heads):
        one = slice(head, head + 1)
        result, _ = dataclasses.replace(case, queries=case.queries[:, one]).run(backend)
        alone.append(result.out)
        plans.append(result.plans)
        step, layout = dataclasses.replace(last, queries=last.queries[:, one]).run(backend)
        together.append(executed_mask(last, step, layout)[:, 0])
    got, _ = case.run(backend)
    torch.testing.assert_close(got.out, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)
    assert len({str(of_head[-1].pages[0].tolist()) for of_head in plans}) == heads  # no two open the same
    for plan, *of_heads in zip(got.plans, *plans, strict=True):
        counts = torch.stack([one.counts for one in of_heads], 1).flatten(0, 1)
        assert torch.equal(plan.counts, counts)  # pages are counted for every head
    step, layout = last.run(backend)
    union = torch.stack(together, 1).any(1, keepdim=True)
    assert torch.equal(executed_mask(last, step, layout), union.expand(-1, heads, -1, -1))
    assert step.plans[0].counts.shape == (2, 1)


@given(cases(), st.integers(0, 100))
def test_more_near_keys_than_needed_change_nothing(case, extra):
    result, _ = case.run("gather")
    closed = max((plan.block.closed for plan in result.plans[:1]), default=0)
    first_is_closed = result.plans and result.plans[0].block.start == case.start
    needed = case.keys.shape[1] - (closed * case.config.chunk_size if first_is_closed else 0)
    near = min(case.keys.shape[1], needed + extra)
    again, _ = case.run("gather", near=near)
    torch.testing.assert_close(again.out, result.out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("start", [0, 100, 199])
@pytest.mark.parametrize("name", ["queries", "near_keys", "near_values", "all"])
def test_states_lie_in_memory_as_they_like(backend, start, name):
    """A last dimension that is not the fastest, say."""
    torch.manual_seed(0)
    config = dataclasses.replace(BASE, backend=backend)
    states = {name: torch.randn(2, 200, 16) for name in ("near_keys", "near_values")}
    layout = build_layout(states["near_keys"][:, :192], states["near_values"][:, :192], config)
    states["queries"] = torch.randn(2, 3, 200 - start, 16)
    turned = {key: x.mT.contiguous().mT if name in (key, "all") else x for key, x in states.items()}
    tile = 1 if start == 199 else None
    plain, other = (
        attend(**given, layout=layout, config=config, start=start, tile=tile) for given in (states, turned)
    )
    torch.testing.assert_close(other.out, plain.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.lse, plain.lse, rtol=0, atol=1e-5)


@given(cases(), st.sampled_from(["reference", "gather"]))
def test_half_precision_is_computed_in_float32(case, backend):
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, theta=0.0, theta_decode=0.0))
    low, _ = case.run(backend, torch.bfloat16)
    assert low.out.dtype == torch.bfloat16 and low.lse.dtype == torch.float32
    rounded = dataclasses.replace(
        case, **{name: getattr(case, name).bfloat16().double() for name in ("queries", "keys", "values")}
    )
    exact, _ = rounded.run("reference")
    torch.testing.assert_close(low.lse.double(), exact.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low.out.double(), exact.out, rtol=2**-7, atol=1e-5)


@given(st.integers(0, 2**31), st.sampled_from([1, 4]), st.integers(0, 5), st.integers(1, 20))
def test_tiles_that_read_no_page_keep_the_near_field(seed, tile, lead, rows):
    """Plans of other topologies may leave the far field of some tiles, or of all, empty."""
    generator = torch.Generator().manual_seed(seed)
    block = Block(40 + lead, 40 + lead + rows, 1)
    first_open = torch.full((2, tiles_of(block, tile), 4), tile)
    opened = torch.rand(first_open.shape, generator=generator) < 0.2
    plan = plan_from_first_open(first_open.where(~opened, 0), block, tile)
    queries = torch.randn(2, 3, rows, 8, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 32, 8, generator=generator, dtype=torch.float64)
    near = (torch.randn_like(queries), torch.randn(2, 3, rows, dtype=torch.float64))
    call = AttentionCall(BARE, "gather", tile, 0.3)
    got, expected = (way.far_field(call, queries, keys, values, plan, near) for way in (gather, reference))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 300, 5000])
def test_gather_in_small_groups_equals_one_large_group(monkeypatch, limit):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    case = Case(BASE, 0, normal(2, 3, 130, 8), normal(2, 130, 8), normal(2, 130, 8), {})
    whole, _ = case.run("gather")
    monkeypatch.setitem(gather.GROUP_ELEMENTS, "cpu", limit)
    cut, _ = case.run("gather")
    torch.testing.assert_close(cut.out, whole.out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_are_those_of_masked_softmax(backend, softcap):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    case = Case(BARE, 0, normal(1, 2, 90, 8), normal(1, 90, 8), normal(1, 90, 8), {"softcap": softcap})
    inputs = (case.queries, case.keys, case.values)
    for tensor in inputs:
        tensor.requires_grad_()
    result, layout = case.run(backend)
    weights = normal(*result.out.shape)
    got = torch.autograd.grad((result.out * weights).sum(), inputs)
    logits = 8**-0.5 * case.queries @ case.keys[:, None].transpose(-1, -2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~executed_mask(case, result, layout), -torch.inf)
    out = logits.softmax(-1) @ case.values[:, None]
    expected = torch.autograd.grad((out * weights).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def arguments(**changes):
    given_ = {
        "queries": torch.zeros(2, 3, 4, 8),
        "near_keys": torch.zeros(2, 4, 8),
        "near_values": torch.zeros(2, 4, 8),
        "layout": None,
        "config": BASE,
        "start": 0,
    }
    return {**given_, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(2, 4, 8)}, r"queries \(2, 4, 8\).*expected \(streams, heads, rows"),
        ({"queries": torch.zeros(2, 3, 0, 8)}, "no rows"),
        ({"near_keys": torch.zeros(1, 4, 8)}, "do not fit keys"),
        ({"near_keys": torch.zeros(2, 4, 7)}, "do not fit keys"),
        ({"near_values": torch.zeros(2, 3, 8)}, "do not fit keys"),
        ({"queries": torch.zeros(2, 3, 4, 8).double()}, "must share one floating dtype"),
        ({"near_keys": torch.zeros(2, 4, 8, device="meta")}, "move them to one device"),
        ({"tile": 4}, "tile=4: must be 1 or the configured tile, 8"),
        ({"sink_logit": torch.zeros(2, 2)}, r"sink_logit \(2, 2\): expected .* \(2, 3\)"),
        ({"start": 5}, "4 near keys: rows from position 5 need the last 9"),
        ({"start": 50}, "the layout holds 0 chunks: the last row needs 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    if changes.get("start") == 50:
        changes = {**changes, "near_keys": torch.zeros(2, 30, 8), "near_values": torch.zeros(2, 30, 8)}
    with pytest.raises(SurgeryError, match=message):
        attend(**arguments(**changes))
