"""Assisted generation: verifying candidates on the paged cache gives greedy decoding's tokens."""

import dataclasses

import pytest
import torch
from tests.surgery.tiny import SINGLE, SPARSE, llama, logits, tokens

from llama_surgery import PagedCache, operated, paged_cache, statistics
from llama_surgery.surgery.compat import CACHE_NAME

PROMPT, NEW = 140, 60
OPTIONS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 0,
}


@pytest.fixture
def _no_logged_deprecations():
    """Stands in for the check of all tests: transformers' own call of the assistant logs a deprecation."""


@pytest.mark.parametrize("assistant", ["another model", "operated model", "prompt lookup"])
def test_assisted_generation_equals_greedy_with_single_queries(assistant):
    helper = llama(seed=1)
    # A repetitive prompt, so that looking up finds candidates; the model's own weights as assistant
    # accept some of them.
    prompt = tokens(1, 20).repeat(1, 7)
    with operated(llama(), SINGLE) as model:
        plain = model.generate(prompt, **OPTIONS)
        if assistant == "prompt lookup":
            out = model.generate(prompt, prompt_lookup_num_tokens=4, **OPTIONS)
        elif assistant == "another model":
            out = model.generate(prompt, assistant_model=helper, **OPTIONS)
        else:
            with operated(helper, SPARSE):
                out = model.generate(prompt, assistant_model=helper, **OPTIONS)
    assert type(out[CACHE_NAME]) is PagedCache
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)


def test_an_assistant_with_the_same_weights_is_believed():
    """Many candidates are accepted, some rejected: the cache is cropped inside and across chunks."""
    prompt = tokens(1, PROMPT)
    with operated(llama(), dataclasses.replace(SINGLE, theta=0.05, theta_decode=0.05)) as model:
        plain = model.generate(prompt, **OPTIONS)
        calls = []
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        twin = llama(seed=0, rms_norm_eps=1e-4)  # nearly the same model, dense
        try:
            out = model.generate(prompt, assistant_model=twin, **OPTIONS)
        finally:
            hook.remove()
    assert torch.equal(out.sequences, plain.sequences)
    assert len(calls) < NEW, "some candidates were accepted"


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_assisted_generation_with_tiles_verifies_in_single_queries(seed):
    """After the first call every verification is a decode step: greedy's tokens while margins are clear."""
    prompt = tokens(1, PROMPT, seed=seed)
    with operated(llama(), SPARSE) as model:
        plain = model.generate(prompt, **OPTIONS)
        out = model.generate(prompt, assistant_model=llama(seed=1), **OPTIONS)
        single = statistics(model).by_tile["1"]["rows"]
    assert type(out[CACHE_NAME]) is PagedCache
    top = torch.cat(plain.logits).topk(2).values
    clear = int(((top[:, 0] - top[:, 1]) < 0.1).float().argmax())
    assert clear > 0
    assert torch.equal(out.sequences[:, : PROMPT + clear], plain.sequences[:, : PROMPT + clear])
    assert single >= 2 * 2 * (NEW - 1), "of both runs and both layers"


def test_early_exit_drafts_for_the_whole_model():
    """transformers cuts layers off the configuration while it drafts, for the cache too."""
    prompt, model = tokens(1, PROMPT), llama(num_hidden_layers=4)
    before = logits(model, prompt)
    with operated(model, SINGLE):
        plain = model.generate(prompt, **OPTIONS)
        out = model.generate(prompt, assistant_early_exit=2, **OPTIONS)
        assert torch.equal(out.sequences, plain.sequences)
        assert len(paged_cache(model).paged) == model.config.num_hidden_layers == 4
    assert torch.equal(logits(model, prompt), before), "with all its layers"
