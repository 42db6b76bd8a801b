"""generate() on an operated model: every strategy, batches, turns, caches."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.tiny import (
    SINGLE,
    SPARSE,
    generation_cuts,
    in_pieces,
    llama,
    logits,
    pad,
    positions,
    tokens,
)
from transformers import DynamicCache, GenerationConfig, StaticCache

from llama_surgery import (
    PagedCache,
    SurgeryError,
    UnsupportedModelError,
    eject,
    operate,
    operated,
    statistics,
)
from llama_surgery.surgery.compat import CACHE_NAME

EXACT = {"rtol": 1e-9, "atol": 1e-9}
PROMPT, NEW = 140, 60  # a chunk fills, and another closes, while decoding
OPTIONS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 0,
}


@pytest.fixture(params=[SPARSE, SINGLE], ids=["tiles", "single"])
def model(request):
    with operated(llama(), request.param) as patient:
        yield patient


def assert_generated(got, expected):
    """generate() returns its logits in float32."""
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-5, atol=1e-5)


def stepped(model, sequence, prompt):
    """Logits (new, vocabulary) of a sequence fed as generate() does: the prompt, then token by token."""
    ids = sequence[None, :-1]
    got, _ = in_pieces(model, ids, generation_cuts(model, prompt, ids.shape[1]))
    return got[0, prompt - 1 :]


def test_greedy(model):
    out = model.generate(tokens(1, PROMPT), **OPTIONS)
    assert type(out[CACHE_NAME]) is PagedCache
    expected = stepped(model, out.sequences[0], PROMPT)
    assert_generated(torch.cat(out.logits), expected)
    assert torch.equal(expected.argmax(-1), out.sequences[0, PROMPT:])


def test_the_end_of_a_prompt_is_computed_in_single_queries():
    """Rows of the last, incomplete tile have pages of their own: θ_decode opens everything for them."""
    config = dataclasses.replace(SPARSE, theta=2.0, theta_decode=0.0)
    for length in (135, 136, 137):
        with operated(llama(), config) as model:
            model.generate(tokens(1, length), max_new_tokens=1, do_sample=False)
            tiles, single = (statistics(model).by_tile.get(tile, {"rows": 0}) for tile in ("8", "1"))
        assert tiles["rows"] == 2 * (length // 8 * 8)
        assert single["rows"] == 2 * (length % 8)
        if length % 8:
            assert single["total_density"] == pytest.approx(1)


def test_sampling_is_stepping_by_hand_with_the_same_seed(model):
    options = {**OPTIONS, "do_sample": True, "top_k": 0, "temperature": 0.7}
    torch.manual_seed(5)
    out = model.generate(tokens(1, PROMPT), **options)
    assert type(out[CACHE_NAME]) is PagedCache
    torch.manual_seed(5)
    ids, cache = tokens(1, PROMPT), None
    new = ids
    for _ in range(NEW):
        got, cache = in_pieces(model, new, generation_cuts(model, PROMPT, new.shape[1]), cache)
        new = torch.multinomial((got[:, -1] / 0.7).softmax(-1), 1)
        ids = torch.cat((ids, new), 1)
    assert torch.equal(out.sequences, ids)


def test_beams_carry_their_caches_with_them(model):
    """The score of every returned beam is that of its own tokens, fed alone."""
    options = {
        **OPTIONS,
        "num_beams": 4,
        "num_return_sequences": 4,
        "max_new_tokens": 40,
        "output_scores": True,
    }
    out = model.generate(tokens(2, PROMPT), **options)
    assert type(out[CACHE_NAME]) is PagedCache
    assert len({tuple(s.tolist()) for s in out.sequences}) == 8
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        log_probs = stepped(model, sequence, PROMPT).log_softmax(-1)
        chosen = log_probs.gather(1, sequence[PROMPT:, None]).sum() / 40
        assert score.item() == pytest.approx(chosen.item(), abs=1e-5)  # generate() scores in float32


def test_several_samples_of_one_prompt(model):
    torch.manual_seed(0)
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 3}
    out = model.generate(tokens(1, PROMPT), **options)
    for b, sequence in enumerate(out.sequences):
        expected = stepped(model, sequence, PROMPT)
        assert_generated(torch.stack(out.logits)[:, b], expected)


def test_turns_on_one_cache(model):
    """A second turn reads the first one's cache: as computing the same calls by hand."""
    first = model.generate(tokens(1, PROMPT), **{**OPTIONS, "max_new_tokens": 30})
    history = torch.cat((first.sequences, tokens(1, 45, seed=7)), 1)
    second = model.generate(history, **{CACHE_NAME: first[CACHE_NAME]}, **OPTIONS)
    assert type(second[CACHE_NAME]) is PagedCache
    assert second[CACHE_NAME] is first[CACHE_NAME]
    cuts = generation_cuts(model, PROMPT, PROMPT + 30)
    cuts += generation_cuts(model, history.shape[1], second.sequences.shape[1] - 1)
    expected, _ = in_pieces(model, second.sequences[:, :-1], cuts)
    assert_generated(torch.stack(second.logits, 1), expected[:, history.shape[1] - 1 :])


def test_turns_with_single_queries_equal_a_fresh_start():
    with operated(llama(), SINGLE) as model:
        first = model.generate(tokens(1, PROMPT), **OPTIONS)
        history = torch.cat((first.sequences, tokens(1, 45, seed=7)), 1)
        second = model.generate(history, **{CACHE_NAME: first[CACHE_NAME]}, **OPTIONS)
        fresh = model.generate(history, **OPTIONS)
    assert torch.equal(second.sequences, fresh.sequences)
    assert_generated(torch.stack(second.logits), torch.stack(fresh.logits))


@settings(max_examples=8)
@given(st.lists(st.integers(1, 150), min_size=2, max_size=3), st.integers(0, 3))
def test_left_padded_batches_equal_each_prompt_alone(lengths, extra):
    rows = [tokens(length, seed=length) for length in lengths]
    width = max(lengths) + extra
    ids, mask = pad(rows, [width - length for length in lengths], width)
    options = {**OPTIONS, "max_new_tokens": 20}
    with operated(llama(), SPARSE) as model:
        out = model.generate(ids, attention_mask=mask, **options)
        assert type(out[CACHE_NAME]) is PagedCache
        for b, row in enumerate(rows):
            alone = model.generate(row[None], **options)
            assert torch.equal(out.sequences[b, width:], alone.sequences[0, len(row) :])
            assert_generated(torch.stack(out.logits)[:, b], torch.cat(alone.logits))


def test_left_padded_beams(model):
    rows = [tokens(140), tokens(101, seed=1)]
    ids, mask = pad(rows, [0, 39], 140)
    options = {**OPTIONS, "num_beams": 3, "max_new_tokens": 30}
    out = model.generate(ids, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **options)
        assert torch.equal(out.sequences[b, 140:], alone.sequences[0, len(row) :])


def test_generate_without_a_cache(model):
    """Without a cache generate() computes everything again in tiles; single queries give the same."""
    out = model.generate(tokens(1, PROMPT), use_cache=False, **{**OPTIONS, "max_new_tokens": 5})
    assert out.get(CACHE_NAME) is None
    expected = logits(model, out.sequences[:, :-1], use_cache=False)[:, PROMPT - 1 :]
    assert_generated(torch.stack(out.logits, 1), expected)


def test_a_cache_of_the_users_own_kind_gives_the_same_logits(model):
    ids = tokens(1, 170)
    paged, _ = in_pieces(model, ids, [96, 168, 169])
    got, cache = in_pieces(model, ids, [96, 168, 169], DynamicCache(config=model.config))
    assert type(cache) is DynamicCache
    torch.testing.assert_close(got, paged, **EXACT)
    got, _ = in_pieces(model, ids, [96, 168, 169], DynamicCache())
    torch.testing.assert_close(got, paged, **EXACT)


def test_a_cache_of_the_users_own_kind_in_generate(model):
    # Whole tiles: the end of a prompt is computed row by row on a paged cache alone.
    rows = [tokens(136), tokens(104, seed=1)]
    ids, mask = pad(rows, [0, 32], 136)
    options = {**OPTIONS, "max_new_tokens": 20}
    paged = model.generate(ids, attention_mask=mask, **options)
    out = model.generate(ids, attention_mask=mask, **{CACHE_NAME: DynamicCache()}, **options)
    assert type(out[CACHE_NAME]) is DynamicCache
    assert_generated(torch.stack(out.logits), torch.stack(paged.logits))


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "offloaded_static"])
def test_other_cache_implementations_are_refused(model, kind):
    with pytest.raises(UnsupportedModelError, match=f"cache_implementation='{kind}'.*Leave it unset"):
        model.generate(tokens(1, 5), cache_implementation=kind, **OPTIONS)


@pytest.mark.parametrize("kind", ["dynamic", "hybrid"])
def test_a_cache_that_grows_may_be_asked_for(model, kind):
    """Checkpoints say so in their generation configuration; what is given stays as it was."""
    wanted = GenerationConfig(**{**OPTIONS, "cache_implementation": kind, "max_new_tokens": 5})
    out = model.generate(tokens(1, 80), generation_config=wanted)
    assert type(out[CACHE_NAME]) is PagedCache and wanted.cache_implementation == kind


def test_a_cache_of_fixed_size_is_refused(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UnsupportedModelError, match="caches of fixed size are not supported"):
        logits(model, tokens(1, 5), **{CACHE_NAME: cache})


def test_forward_builds_a_paged_cache_only_where_one_is_wanted(model):
    assert type(model(tokens(1, 5))[CACHE_NAME]) is PagedCache
    assert model(tokens(1, 5), use_cache=False).get(CACHE_NAME) is None


def test_a_paged_cache_is_refused_by_a_model_that_was_ejected():
    model = operate(llama(), SPARSE)
    try:
        cache = model(tokens(1, 100))[CACHE_NAME]
    finally:
        eject(model)
    with pytest.raises(UnsupportedModelError, match="attention that fills it is not operated"):
        model(tokens(1, 3), **{CACHE_NAME: cache})


def test_a_paged_cache_of_another_configuration_is_refused():
    with operated(llama(), SPARSE) as model:
        cache = model(tokens(1, 100))[CACHE_NAME]
    with (
        operated(llama(), SINGLE) as model,
        pytest.raises(SurgeryError, match="made for another model or configuration"),
    ):
        model(tokens(1, 3), **{CACHE_NAME: cache})


def test_positions_of_a_padded_batch_may_be_left_to_transformers(model):
    """Without position_ids transformers counts slots; pages are anchored on real tokens all the same."""
    ids, mask = pad([tokens(100)], [28], 128)
    shifted = logits(model, ids, attention_mask=mask, position_ids=torch.arange(128)[None])[:, 28:]
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[:, 28:], shifted, **EXACT)
    expected = logits(model, ids[:, 28:], position_ids=torch.arange(28, 128)[None])
    torch.testing.assert_close(shifted, expected, **EXACT)
    assert positions(mask)[0, 28] == 0
