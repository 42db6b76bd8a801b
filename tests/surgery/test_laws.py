"""The four laws on a whole model: docs/semantics.md, "What follows"."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.tiny import (
    DENSE_LIMIT,
    SINGLE,
    SPARSE,
    build,
    in_pieces,
    llama,
    logits,
    pad,
    positions,
    tokens,
)

from llama_surgery import PagedCache, operated, statistics

FEW = settings(max_examples=25)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@st.composite
def configurations(draw):
    """Options under which all laws must hold, each with tiles of 8 or 1."""
    config = draw(st.sampled_from([SPARSE, SINGLE, dataclasses.replace(SPARSE, theta_decode=0.0)]))
    return dataclasses.replace(
        config,
        backend=draw(st.sampled_from(["gather", "auto"])),
        dense_until=draw(st.sampled_from([0, 0, 128])),
        window=draw(st.sampled_from([0, 32])),
    )


def cuts_for(draw, config, length):
    """Where law 3 allows cuts: multiples of T that leave no single token, or anything with T = 1."""
    cuts = draw(st.lists(st.integers(1, max(1, (length - 1) // config.tile)), max_size=4))
    cuts = [cut * config.tile for cut in cuts if cut * config.tile < length]
    return [cut for cut in cuts if config.tile == 1 or cut != length - 1]


@st.composite
def arrivals(draw):
    """(configuration, ids of one sequence, cuts)."""
    config = draw(configurations())
    length = draw(st.one_of(st.sampled_from([1, 64, 65, 96, 97, 200]), st.integers(1, 300)))
    ids = tokens(length, seed=draw(st.integers(0, 1000)))
    return config, ids, cuts_for(draw, config, length)


@FEW
@given(arrivals())
def test_law_1_pages_do_not_depend_on_how_the_text_arrived(case):
    config, ids, cuts = case
    with operated(llama(), config) as model:
        _, whole = in_pieces(model, ids, [])
        _, pieces = in_pieces(model, ids, cuts)
    assert type(whole) is type(pieces) is PagedCache
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        (one,), (other,) = one.stores, other.stores
        assert one.length == other.length == len(ids)
        if one.layout is None:
            assert other.layout is None
            continue
        assert torch.equal(one.layout.order, other.layout.order)
        torch.testing.assert_close(one.layout.keys, other.layout.keys, **EXACT)
        torch.testing.assert_close(one.layout.values, other.layout.values, **EXACT)
        torch.testing.assert_close(one.layout.moments.mean, other.layout.moments.mean, **EXACT)
        torch.testing.assert_close(one.layout.moments.variance, other.layout.moments.variance, **EXACT)


@FEW
@given(arrivals(), st.data())
def test_law_2_no_later_token_changes_an_earlier_logit(case, data):
    config, ids, _ = case
    kept = data.draw(st.integers(0, len(ids) - 1))
    changed = torch.cat((ids[:kept], tokens(len(ids) - kept, seed=12345)))
    with operated(llama(), config) as model:
        before = logits(model, ids)[:, :kept]
        torch.testing.assert_close(logits(model, changed)[:, :kept], before, **EXACT)
        if kept:
            torch.testing.assert_close(logits(model, ids[:kept]), before, **EXACT)


@FEW
@given(arrivals())
def test_law_3_logits_do_not_depend_on_the_cuts(case):
    config, ids, cuts = case
    with operated(llama(), config) as model:
        whole = logits(model, ids, use_cache=False)
        pieces, _ = in_pieces(model, ids, cuts)
    torch.testing.assert_close(pieces, whole, **EXACT)


def test_law_3_with_single_queries_holds_for_steps_of_one_token():
    ids = tokens(200)
    with operated(llama(), SINGLE) as model:
        whole = logits(model, ids)
        steps, _ = in_pieces(model, ids, [90, *range(91, 200)])
        assert 0 < statistics(model).far_density < 0.5
    torch.testing.assert_close(steps, whole, **EXACT)


def test_a_step_of_one_token_uses_its_own_theta():
    """With larger tiles a call of one token is a decode step: it equals θ_decode with tiles of one."""
    ids = tokens(200)
    config = dataclasses.replace(SPARSE, theta=0.0, theta_decode=SINGLE.theta)
    with operated(llama(), config) as model:
        _, cache = in_pieces(model, ids[:199], [])
        step, _ = in_pieces(model, ids[199:], [], cache)
        prefilled = logits(model, ids)[:, 199:]
    with operated(llama(), DENSE_LIMIT) as model:
        _, cache = in_pieces(model, ids[:199], [])
        dense, _ = in_pieces(model, ids[199:], [], cache)
    torch.testing.assert_close(prefilled, dense, **EXACT)
    assert (step - dense).abs().max() > 1e-3


@pytest.mark.parametrize("dense_until", [64, 128, 256])
def test_positions_below_dense_until_are_dense_in_any_call(dense_until):
    ids = tokens(300)
    dense = logits(llama(), ids)
    for config in (SPARSE, SINGLE):
        config = dataclasses.replace(config, dense_until=dense_until, theta=0.3, theta_decode=0.3)
        with operated(llama(), config) as model:
            whole = logits(model, ids)
            pieces, _ = in_pieces(model, ids, [72, 160])
            short, _ = in_pieces(model, ids[: dense_until + 1], [dense_until])
        torch.testing.assert_close(whole[:, :dense_until], dense[:, :dense_until], **EXACT)
        torch.testing.assert_close(pieces, whole, **EXACT)
        assert (whole - dense)[:, dense_until:].abs().max() > 1e-3
        torch.testing.assert_close(short[:, :-1], dense[:, :dense_until], **EXACT)


@FEW
@given(st.data())
def test_law_4_theta_zero_is_dense(data):
    config = dataclasses.replace(data.draw(configurations()), theta=0.0, theta_decode=0.0)
    ids = tokens(data.draw(st.integers(1, 300)), seed=data.draw(st.integers(0, 1000)))
    # Any cut at all, tiles or not.
    cuts = data.draw(st.lists(st.integers(1, max(1, len(ids) - 1)), max_size=3))
    dense = logits(llama(), ids)
    with operated(llama(), config) as model:
        pieces, _ = in_pieces(model, ids, cuts)
        assert statistics(model).total_density == pytest.approx(1)
    torch.testing.assert_close(pieces, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 8])
def test_law_4_in_float32(tile):
    config = dataclasses.replace(DENSE_LIMIT, tile=tile)
    model, ids = build("Llama", dtype=torch.float32), tokens(400)
    dense = logits(model, ids)
    with operated(model, config):
        got = logits(model, ids)
    assert (got - dense).norm() <= 1e-5 * dense.norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_law_4_in_bfloat16(seed):
    """The operated model's rounding error is at most 1.5 times that of the dense model."""
    low, ids = build("Llama", seed, dtype=torch.bfloat16), tokens(400, seed=seed)
    exact = logits(copy.deepcopy(low).double(), ids)
    dense = (logits(low, ids).double() - exact).square().mean().sqrt()
    with operated(low, DENSE_LIMIT):
        got = (logits(low, ids).double() - exact).square().mean().sqrt()
    assert got <= 1.5 * dense


@st.composite
def batches(draw):
    """Sequences of different lengths with padding on either side, or on both."""
    config = draw(configurations())
    width = draw(st.integers(100, 220))
    rows, sides = [], []
    for b in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, width))
        rows.append(tokens(length, seed=draw(st.integers(0, 1000)) + b))
        sides.append(draw(st.integers(0, width - length)))
    return config, rows, sides, width


@FEW
@given(batches())
def test_padding_and_company_never_change_a_real_tokens_logit(case):
    config, rows, sides, width = case
    ids, mask = pad(rows, sides, width)
    with operated(llama(), config) as model:
        for use_cache in (True, False):
            together = logits(
                model, ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache
            )
            for b, (row, left) in enumerate(zip(rows, sides, strict=True)):
                alone = logits(model, row)[0]
                torch.testing.assert_close(together[b, left : left + len(row)], alone, **EXACT)


@FEW
@given(batches(), st.lists(st.integers(1, 219), max_size=4))
def test_padded_batches_in_pieces_equal_each_sequence_alone(case, cuts):
    """Pieces may fall anywhere for rows of one query: padding shifts each sequence differently."""
    config, rows, sides, width = case
    config = dataclasses.replace(config, tile=1, theta=0.15, theta_decode=0.15)
    ids, mask = pad(rows, sides, width)
    with operated(llama(), config) as model:
        together, cache = in_pieces(model, ids, [c for c in cuts if c < width], mask=mask)
        for b, (row, left) in enumerate(zip(rows, sides, strict=True)):
            alone = logits(model, row)[0]
            torch.testing.assert_close(together[b, left : left + len(row)], alone, **EXACT)
    # Padding is not stored.
    for layer in cache.layers:
        lengths = [store.length for store in layer.stores]
        assert lengths == [len(row) for row in rows] or lengths == [width]


@FEW
@given(batches(), st.data())
def test_the_order_of_a_batch_does_not_matter(case, data):
    config, rows, sides, width = case
    ids, mask = pad(rows, sides, width)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    with operated(llama(), config) as model:
        one = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        other = logits(model, ids[order], attention_mask=mask[order], position_ids=positions(mask)[order])
    torch.testing.assert_close(other[mask[order].bool()], one[order][mask[order].bool()], **EXACT)


def test_the_test_model_is_sparse_enough_to_mean_something():
    with operated(llama(), SPARSE) as model:
        got = logits(model, tokens(400))
        assert 0.05 < statistics(model).far_density < 0.4
    assert (got - logits(llama(), tokens(400))).abs().max() > 0.1
