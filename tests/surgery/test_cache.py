"""Operations on a paged cache: each must leave what a fresh cache would hold."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.tiny import (
    SINGLE,
    SPARSE,
    VOCABULARY,
    build,
    in_pieces,
    llama,
    logits,
    pad,
    positions,
    tokens,
)

from llama_surgery import SurgeryError, operated, paged_cache
from llama_surgery.surgery import store
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import set_config

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FEW = settings(max_examples=20)


@pytest.fixture(scope="module", autouse=True)
def _operated():
    with operated(llama(), SINGLE):
        yield


@FEW
@given(st.integers(1, 200), st.data())
def test_crop_and_go_on(length, data):
    """Also into a full chunk, which then returns to its original order, and more than once."""
    model, kept, cache = llama(), tokens(length), None
    for turn in range(data.draw(st.integers(1, 3))):
        have = 0 if cache is None else cache.get_seq_length()
        _, cache = in_pieces(model, kept[have:], [], cache)
        removed = data.draw(st.integers(0, len(kept)))
        cache.crop(-removed)
        assert cache.get_seq_length() == len(kept) - removed
        kept = torch.cat((kept[: len(kept) - removed], tokens(removed + 1, seed=turn + 1)))
    have = cache.get_seq_length()
    got, cache = in_pieces(model, kept[have:], [], cache)
    torch.testing.assert_close(got, logits(model, kept)[:, have:], **EXACT)
    fresh = in_pieces(model, kept, [])[1]
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        (one,), (other,) = one.stores, other.stores
        assert one.length == other.length
        assert (one.layout is None) == (other.layout is None)
        if one.layout is not None:
            assert torch.equal(one.layout.order, other.layout.order)
            torch.testing.assert_close(one.layout.keys, other.layout.keys, **EXACT)


def test_crop_to_a_length():
    """A positive number is the length to keep, as older versions of transformers call it."""
    model, ids = llama(), tokens(150)
    _, cache = in_pieces(model, ids, [])
    for layer in cache.layers:
        layer.crop(70)
    assert cache.get_seq_length() == 70
    got, _ = in_pieces(model, ids[70:], [], cache)
    torch.testing.assert_close(got, logits(model, ids)[:, 70:], **EXACT)


def test_crop_by_a_tensor():
    """As assisted generation of older versions of transformers calls it."""
    model, ids = llama(), tokens(150)
    _, cache = in_pieces(model, ids, [])
    cache.crop(torch.tensor(-80))
    assert type(cache.get_seq_length()) is int
    got, cache = in_pieces(model, ids[70:], [8, 20], cache)
    torch.testing.assert_close(got, logits(model, ids)[:, 70:], **EXACT)
    assert cache.get_seq_length() == 150


@FEW
@given(st.lists(st.integers(1, 160), min_size=2, max_size=3), st.data())
def test_crop_a_padded_batch(lengths, data):
    model, width = llama(), max(lengths) + data.draw(st.integers(0, 5))
    rows = [tokens(length, seed=b) for b, length in enumerate(lengths)]
    sides = [data.draw(st.integers(0, width - length)) for length in lengths]
    ids, mask = pad(rows, sides, width)
    _, cache = in_pieces(model, ids, [], mask=mask)
    keep = data.draw(st.integers(1, width))
    cache.crop(keep - width)
    more, ones = tokens(len(rows), 9, seed=9), torch.ones(len(rows), 9, dtype=torch.int64)
    mask = torch.cat((mask[:, :keep], ones), 1)
    out = model(
        more, attention_mask=mask, position_ids=positions(mask)[:, keep:], **{CACHE_NAME: cache}
    ).logits
    for b, (row, left) in enumerate(zip(rows, sides, strict=True)):
        alone = torch.cat((row[: max(0, keep - left)], more[b]))
        torch.testing.assert_close(out[b], logits(model, alone)[0, -9:], **EXACT)


def change(name):
    """(operation on a cache of 3 sequences, the sequences it leaves)."""
    return {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        "repeat and reorder": (
            lambda cache: (cache.batch_repeat_interleave(2), cache.reorder_cache(torch.tensor([5, 1]))),
            [2, 0],
        ),
    }[name]


@pytest.mark.parametrize("name", ["reorder", "repeat", "select", "mask", "repeat and reorder"])
@pytest.mark.parametrize("lengths", [[150, 150, 150], [64, 64, 64], [150, 93, 1], [20, 20, 10]])
def test_changing_the_batch(name, lengths):
    model, width = llama(), max(lengths)
    rows = [tokens(length, seed=b) for b, length in enumerate(lengths)]
    ids, mask = pad(rows, [width - length for length in lengths], width)
    _, cache = in_pieces(model, ids, [], mask=mask)
    apply, left = change(name)
    apply(cache)
    more = tokens(len(left), 70, seed=8)
    mask = torch.cat((mask[left], torch.ones_like(more)), 1)
    for start, stop in ((0, 69), (69, 70)):  # grow on their own, though they may share tensors
        out = model(
            more[:, start:stop],
            attention_mask=mask[:, : width + stop],
            position_ids=positions(mask)[:, width + start : width + stop],
            **{CACHE_NAME: cache},
        ).logits
        for b, sequence in enumerate(left):
            alone = logits(model, torch.cat((rows[sequence], more[b])))[0, -70:]
            torch.testing.assert_close(out[b], alone[start:stop], **EXACT)


def test_repeated_sequences_do_not_write_into_each_other():
    model, row = llama(), tokens(60)
    _, cache = in_pieces(model, row, [])
    cache.batch_repeat_interleave(2)
    more = tokens(2, 10, seed=3)  # fills the chunk differently for each
    got, _ = in_pieces(model, more, [], cache)
    for b in range(2):
        alone = logits(model, torch.cat((row, more[b])))[0, -10:]
        torch.testing.assert_close(got[b], alone, **EXACT)


def test_reset():
    model, cache = llama(), paged_cache(llama())
    cache.batch_repeat_interleave(2)  # nothing to repeat yet
    _, cache = in_pieces(model, tokens(2, 150), [], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    got, _ = in_pieces(model, tokens(1, 80), [], cache)
    torch.testing.assert_close(got, logits(model, tokens(80)), **EXACT)


def test_a_row_of_padding_alone_and_a_sequence_that_begins_later():
    model = llama()
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[1, :100] = 0  # the whole first piece is padding
    ids = tokens(2, 150)
    got, cache = in_pieces(model, ids, [90], mask=mask)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[0], logits(model, ids[0])[0], **EXACT)
    torch.testing.assert_close(got[1, 100:], logits(model, ids[1, 100:])[0], **EXACT)
    assert [store.length for store in cache.layers[0].stores] == [150, 50]


def test_padding_between_turns():
    """Right padding of an earlier turn stays in the mask, and out of the pages."""
    model = llama()
    ids, mask = pad([tokens(90), tokens(120, seed=1)], [0, 0], 120)
    more = tokens(2, 40, seed=2)
    mask = torch.cat((mask, torch.ones_like(more)), 1)
    got, _ = in_pieces(model, torch.cat((ids, more), 1), [120], mask=mask)
    for b, length in enumerate((90, 120)):
        alone = torch.cat((ids[b, :length], more[b]))
        torch.testing.assert_close(got[b, 120:], logits(model, alone)[0, length:], **EXACT)


def test_a_batch_of_another_size_is_refused():
    _, cache = in_pieces(llama(), tokens(2, 20), [])
    with pytest.raises(SurgeryError, match="a batch of 3 on a cache of 2: use batch_repeat_interleave"):
        llama()(tokens(3, 1), **{CACHE_NAME: cache})


def test_a_mask_that_forgets_the_padding_is_refused():
    ids, mask = pad([tokens(20), tokens(12)], [0, 8], 20)
    _, cache = in_pieces(llama(), ids, [], mask=mask)
    with pytest.raises(SurgeryError, match="a sequence of 12 cached tokens, but no attention mask was given"):
        llama()(tokens(2, 1), **{CACHE_NAME: cache})


@pytest.mark.parametrize("hidden", [slice(0, 5), slice(10, 20), slice(45, 50)])
@pytest.mark.parametrize("cropped", [0, 4])
@pytest.mark.parametrize("new", [1, 9])
def test_a_mask_that_hides_tokens_of_earlier_calls_is_refused(hidden, cropped, new):
    """It would forget the last tokens in their place."""
    _, cache = in_pieces(llama(), tokens(2, 50 + cropped), [])
    cache.crop(-cropped)
    mask = torch.ones(2, 50 + new, dtype=torch.int64)
    mask[:, hidden] = 0
    with pytest.raises(
        SurgeryError,
        match=f"a sequence of 50 cached tokens, but the .* counts {50 - (hidden.stop - hidden.start)}",
    ):
        logits(llama(), tokens(2, new), attention_mask=mask, **{CACHE_NAME: cache})


def test_a_mask_of_too_few_columns_is_refused():
    ids, mask = pad([tokens(20), tokens(12)], [0, 8], 20)
    _, cache = in_pieces(llama(), ids, [], mask=mask)
    with pytest.raises(SurgeryError, match="columns"):
        llama()(tokens(2, 1), attention_mask=mask, **{CACHE_NAME: cache})


def test_offloading_is_refused():
    with pytest.raises(SurgeryError, match="cannot be offloaded"):
        paged_cache(llama()).layers[0].offload()


def test_keys_that_are_not_finite_are_refused():
    model = llama()
    weight = model.model.layers[0].self_attn.k_proj.weight
    before = weight.data.clone()
    try:
        weight.data[0, 0] = torch.nan
        with pytest.raises(SurgeryError, match="keys hold NaN or infinity"):
            logits(model, tokens(20))
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("cuts", [[], [100, 150, *range(192, 240)]], ids=["one call", "pieces and steps"])
def test_where_the_host_does_not_look_a_bad_key_shows_in_all_later_logits(cuts, monkeypatch):
    """As on a GPU: the page of such a key has no score, and would be left out in silence."""
    monkeypatch.setattr(store, "CHECKED_DEVICES", ())
    model, ids = build("Llama", dtype=torch.float32, num_hidden_layers=1), tokens(2, 240)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = torch.nan
    ids = ids.clamp_max(VOCABULARY - 2)
    ids[0, 70] = VOCABULARY - 1
    with operated(model, dataclasses.replace(SINGLE, theta_decode=0.15)):
        got, _ = in_pieces(model, ids, cuts)
    assert got[0, :64].isfinite().all() and got[1].isfinite().all()
    assert got[0, 128 + SINGLE.window :].isnan().all()  # its chunk is part of their far field


def test_a_cache_goes_on_in_its_own_dtype_alone():
    """Before anything is written: the cache is as good as it was."""
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        expected = logits(model, ids)
        _, cache = in_pieces(model, ids[:, :96], [])
        model.float()
        with pytest.raises(
            SurgeryError, match=r"16 and 16 channels, torch.float32 on cpu, but.*torch.float64"
        ):
            in_pieces(model, ids[:, 96:], [], cache)
        model.double()
        cache = in_pieces(model, ids[:, :96], [])[1]
        got, _ = in_pieces(model, ids[:, 96:], [], cache)
    torch.testing.assert_close(got, expected[:, 96:], rtol=1e-5, atol=1e-5)


def test_a_cache_of_a_model_of_another_shape_is_refused():
    with operated(build("Llama"), SPARSE) as model:
        _, cache = in_pieces(model, tokens(1, 96), [])
    with (
        operated(build("Llama", num_key_value_heads=4, head_dim=8), SPARSE) as model,
        pytest.raises(SurgeryError, match=r"4 KV heads of 8.*holds 2 KV heads of 16"),
    ):
        in_pieces(model, tokens(1, 3), [], cache)


def test_a_cache_does_not_go_on_with_another_backend():
    with operated(build("Llama"), SPARSE) as model:
        _, cache = in_pieces(model, tokens(1, 96), [])
        set_config(model, dataclasses.replace(SPARSE, backend="reference"))
        with pytest.raises(SurgeryError, match="another model or configuration"):
            in_pieces(model, tokens(1, 3), [], cache)
