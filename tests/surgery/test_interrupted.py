"""Calls that end halfway: what they left in a cache is never gone on with in silence."""

import contextlib

import pytest
import torch
from tests.surgery.tiny import SINGLE, SPARSE, build, in_pieces, logits, tokens

from llama_surgery import PagedCache, SurgeryError, operated, paged_cache
from llama_surgery.surgery.compat import CACHE_NAME

EXACT = {"rtol": 1e-5, "atol": 1e-5}
REFUSED = "the last call on this cache did not end"


@contextlib.contextmanager
def broken(module, error=RuntimeError):
    """A module that fails when it is called."""

    def fail(*args):
        raise error("broken")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


PLACES = {
    "between layers": lambda model: model.model.layers[0].mlp,
    "in the last layer": lambda model: model.model.layers[1].self_attn.o_proj,
    "behind all layers": lambda model: model.lm_head,
    "within the first layer": lambda model: model.model.layers[0].self_attn.o_proj,
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cached", [0, 96])
def test_a_retry_after_a_failed_call_is_refused(place, cached, error):
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        cache = paged_cache(model)
        if cached:
            in_pieces(model, ids[:, :cached], [], cache)
        with broken(PLACES[place](model), error), pytest.raises(error):
            in_pieces(model, ids[:, cached:], [], cache)
        for _ in range(2):
            with pytest.raises(SurgeryError, match=REFUSED):
                in_pieces(model, ids[:, cached:], [], cache)
        with pytest.raises(SurgeryError, match=REFUSED):
            model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=2)
        cache.reset()
        got, _ = in_pieces(model, ids, [], cache)
        torch.testing.assert_close(got, logits(model, ids), **EXACT)


def test_a_single_layer_that_fails_is_noticed_too():
    model, ids = build("Llama", num_hidden_layers=1), tokens(1, 150)
    with operated(model, SPARSE):
        _, cache = in_pieces(model, ids[:, :96], [])
        with broken(model.model.layers[0].mlp), pytest.raises(RuntimeError, match="broken"):
            in_pieces(model, ids[:, 96:], [], cache)
        with pytest.raises(SurgeryError, match=REFUSED):
            in_pieces(model, ids[:, 96:], [], cache)


def test_the_decoder_called_without_its_head_is_watched_too():
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE), torch.no_grad():
        cache = model.model(ids[:, :96])[CACHE_NAME]
        with broken(model.model.layers[0].mlp), pytest.raises(RuntimeError, match="broken"):
            model.model(ids[:, 96:], **{CACHE_NAME: cache})
        with pytest.raises(SurgeryError, match=REFUSED):
            model(ids[:, 96:], **{CACHE_NAME: cache})


def test_layers_that_are_not_operated_count():
    """Those of a sliding window are written first, and cannot be taken back."""
    model = build("Gemma2", layer_types=["sliding_attention", "full_attention"], sliding_window=64)
    ids = tokens(1, 150)
    with operated(model, SPARSE):
        _, cache = in_pieces(model, ids[:, :96], [])
        with broken(model.model.layers[0].mlp), pytest.raises(RuntimeError, match="broken"):
            in_pieces(model, ids[:, 96:], [], cache)
        with pytest.raises(SurgeryError, match=REFUSED):
            in_pieces(model, ids[:, 96:], [], cache)


@pytest.mark.parametrize("cached", [0, 96])
def test_a_call_that_was_refused_may_be_made_again(cached):
    """Nothing was written: with the mask corrected, the cache goes on as if it had not been made."""
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        cache = paged_cache(model)
        if cached:
            in_pieces(model, ids[:, :cached], [], cache)
        mask = torch.ones(1, 150, dtype=torch.int64)
        with pytest.raises(SurgeryError):
            model(ids[:, cached:], attention_mask=mask[:, :20], **{CACHE_NAME: cache})
        with pytest.raises(SurgeryError, match="output_attentions"):
            model(ids[:, cached:], output_attentions=True, **{CACHE_NAME: cache})
        with torch.no_grad():
            got = model(ids[:, cached:], attention_mask=mask, **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(got, logits(model, ids)[:, cached:], **EXACT)


def test_keys_that_are_refused_leave_a_cache_that_is_refused():
    """The first layer has taken the call's columns by then, the second has not."""
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        _, cache = in_pieces(model, ids[:, :96], [])
        weight = model.model.layers[1].self_attn.k_proj.weight
        before = weight.data.clone()
        weight.data[0, 0] = torch.nan
        with pytest.raises(SurgeryError, match="NaN"):
            in_pieces(model, ids[:, 96:], [], cache)
        weight.data.copy_(before)
        with pytest.raises(SurgeryError, match=REFUSED):
            in_pieces(model, ids[:, 96:], [], cache)


def test_tokens_that_all_layers_took_can_be_taken_back():
    """A call that failed behind its last layer: cropping what it added mends the cache."""
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SINGLE):
        _, cache = in_pieces(model, ids[:, :96], [])
        with broken(model.lm_head), pytest.raises(RuntimeError, match="broken"):
            in_pieces(model, ids[:, 96:], [], cache)
        cache.crop(96 - cache.get_seq_length())
        got, _ = in_pieces(model, ids[:, 96:], [], cache)
        torch.testing.assert_close(got, logits(model, ids)[:, 96:], **EXACT)


def test_layers_of_different_lengths_are_refused_whoever_made_them_so():
    model, ids = build("Llama"), tokens(1, 150)
    with operated(model, SPARSE):
        cache = PagedCache(model.config, SPARSE, [0, 1])
        in_pieces(model, ids[:, :96], [], cache)
        cache.layers[0].crop(-8)
        with pytest.raises(SurgeryError, match=f"{REFUSED}: its layers hold 88 to 96 tokens"):
            in_pieces(model, ids[:, 96:], [], cache)
