"""What generate() knows: where each sequence's prompt ends, whatever its calls bring. Nothing stays."""

import copy
import dataclasses
import inspect
import threading

import pytest
import torch
from tests.surgery.tiny import SPARSE, build, generation_cuts, in_pieces, llama, logits, pad, tokens
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, Phi3ForCausalLM

from llama_surgery import PagedCache, operated, reset_statistics, statistics
from llama_surgery.surgery.compat import CACHE_NAME

EXACT = {"rtol": 1e-9, "atol": 1e-9}
TILE, NEW = SPARSE.tile, 24
OPTIONS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 0,
}


@pytest.fixture
def model():
    with operated(llama(), SPARSE) as patient:
        yield patient


@pytest.fixture
def _no_logged_deprecations():
    """Stands in for the check of all tests: transformers' own call of the assistant logs a deprecation."""


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def repetitive(length):
    return tokens(1, 20).repeat(1, 8)[:, :length]


@pytest.mark.parametrize("length", [136, 137, 140, 143])
@pytest.mark.parametrize("guesses", [3, 12])
def test_prompt_lookup_says_what_greedy_says(model, length, guesses):
    """The first call holds prompt and guesses: rows of the prompt's last tile stand alone, not the call's."""
    prompt = repetitive(length)
    expected = model.generate(prompt, **OPTIONS)
    assert_same(model.generate(prompt, prompt_lookup_num_tokens=guesses, **OPTIONS), expected)


@pytest.mark.parametrize("assistant", ["dense", "operated", "the model's first layer"])
@pytest.mark.parametrize("length", [136, 141])
def test_assisted_generation_says_what_greedy_says(model, assistant, length):
    prompt, helper = tokens(1, length), llama(rms_norm_eps=1e-4)
    expected = model.generate(prompt, **OPTIONS)
    if assistant == "dense":
        got = model.generate(prompt, assistant_model=helper, **OPTIONS)
    elif assistant == "operated":
        with operated(helper, dataclasses.replace(SPARSE, theta=0.3, theta_decode=0.3)):
            got = model.generate(prompt, assistant_model=helper, **OPTIONS)
    else:
        got = model.generate(prompt, assistant_early_exit=1, **OPTIONS)
    assert_same(got, expected)


@pytest.mark.parametrize("length", [129, 136, 139, 144])
@pytest.mark.parametrize("chunk", [TILE, 64, 128])
def test_a_prompt_in_chunks_says_what_it_says_in_one_piece(model, length, chunk):
    """Also where a chunk is a single token, or a part of the last tile."""
    expected = model.generate(tokens(1, length), **OPTIONS)
    assert_same(model.generate(tokens(1, length), prefill_chunk_size=chunk, **OPTIONS), expected)


@pytest.mark.parametrize("chunk", [None, 64])
def test_every_sequence_of_a_batch_has_its_own_end(model, chunk):
    """Before its padding shows, too: the first chunk is full for all."""
    rows = [tokens(length, seed=length) for length in (141, 133, 117)]
    ids, mask = pad(rows, [0, 8, 24], 141)
    out = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **OPTIONS)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], **OPTIONS)
        assert torch.equal(out.sequences[b, 141:], alone.sequences[0, len(row) :])
        torch.testing.assert_close(
            torch.stack(out.logits)[:, b], torch.cat(alone.logits), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_another_dtype_counts_the_same_tokens(model, dtype):
    ids, mask = pad([tokens(141), tokens(117, seed=1)], [0, 24], 141)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert_same(model.generate(ids, attention_mask=mask.to(dtype), **OPTIONS), expected)


def test_ends_that_only_later_padding_tells_apart(model):
    """Padding on the right: the sequences are equally long until the shorter one's prompt ends."""
    ids, mask = pad([tokens(141), tokens(100, seed=1)], [0, 0], 141)
    reset_statistics(model)
    model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, prefill_chunk_size=64)
    single = statistics(model).by_tile["1"]["rows"]
    assert single == 2 * (141 % TILE + 100 % TILE)


@pytest.mark.parametrize("first", range(1, 10))
def test_going_on_later_says_what_generating_at_once_says(model, first):
    """The one token that is not cached is a decode step, wherever in a tile it falls."""
    prompt = tokens(1, 139)
    expected = model.generate(prompt, **OPTIONS)
    one = model.generate(prompt, **{**OPTIONS, "max_new_tokens": first})
    rest = {**OPTIONS, "max_new_tokens": NEW - first, CACHE_NAME: one[CACHE_NAME]}
    two = model.generate(one.sequences, **rest)
    assert torch.equal(two.sequences, expected.sequences)
    both = torch.stack((*one.logits, *two.logits))
    torch.testing.assert_close(both, torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 16}], ids=["greedy", "chunks"])
@pytest.mark.skipif(
    "past_length = 0" in inspect.getsource(GenerationMixin._prefill),
    reason="this transformers counts chunks from 0 on a cache that holds a turn",
)
def test_a_second_turn_settles_its_own_last_tile(model, mode):
    """Given what is new alone, beside the whole mask."""
    first = model.generate(repetitive(137), **OPTIONS)
    cache, cached = copy.deepcopy(first[CACHE_NAME]), 160
    new = torch.cat((first.sequences[:, cached:], repetitive(45)), 1)
    prompt = cached + new.shape[1]
    second = model.generate(
        new,
        attention_mask=torch.ones(1, prompt, dtype=torch.int64),
        **{CACHE_NAME: cache},
        **mode,
        **OPTIONS,
    )
    assert second[CACHE_NAME] is cache
    stop = cached + second.sequences.shape[1] - 1
    cuts = [cut - cached for cut in generation_cuts(model, prompt, stop)]
    expected, _ = in_pieces(model, second.sequences[:, :-1], cuts, first[CACHE_NAME])
    expected = expected[:, new.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(second.logits, 1), expected.float(), rtol=1e-5, atol=1e-5)


def test_rolling_back_into_the_prompt_settles_it_again(model):
    ids = tokens(1, 150)
    expected, _ = in_pieces(model, ids, generation_cuts(model, 140, 150))
    cache = PagedCache(model.config, SPARSE, [0, 1])
    with cache.prompt(140):
        in_pieces(model, ids, [64, 140, 143], cache)
        cache.crop(-54)
        got, _ = in_pieces(model, ids[:, 96:], [40, 48], cache)
    torch.testing.assert_close(got, expected[:, 96:], **EXACT)


class Watching(LogitsProcessor):
    """Copies the model's cache, or fails, while generate() runs."""

    def __init__(self, caches, fail=False):
        self.caches, self.fail = caches, fail

    def __call__(self, input_ids, scores):
        if self.fail and input_ids.shape[1] > 141:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("how", ["greedy", "lookup", "interrupted", "beams"])
def test_a_plain_call_after_generate_is_a_plain_call(model, how):
    """docs/semantics.md: several tokens are tiles, with no rows of their own at the end."""
    # With this prompt the beams that are returned are the beams that the cache holds.
    prompt, cache = tokens(1, 140, seed=3), PagedCache(model.config, SPARSE, [0, 1])
    options = {
        "greedy": {},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "interrupted": {"logits_processor": LogitsProcessorList([Watching([], fail=True)])},
        "beams": {"num_beams": 2, "num_return_sequences": 2},
    }[how]
    try:
        out = model.generate(prompt, **{CACHE_NAME: cache}, **options, **OPTIONS)
    except KeyboardInterrupt:
        assert how == "interrupted"
    else:
        assert how != "interrupted"
        prompt = out.sequences
    held = cache.get_seq_length()
    more = tokens(len(prompt), 47, seed=5)
    if how == "interrupted":
        _, fresh = in_pieces(model, prompt, generation_cuts(model, 140, 140))
        cache.crop(140 - held)
    else:
        _, fresh = in_pieces(model, prompt[:, :held], generation_cuts(model, 140, held))
    expected, _ = in_pieces(model, more, [], fresh)
    reset_statistics(model)
    got, _ = in_pieces(model, more, [], cache)
    assert set(statistics(model).by_tile) == {str(TILE)}
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_copy_taken_while_generate_runs_forgets_it_too(model):
    copies = []

    class Copying(LogitsProcessor):
        def __call__(self, input_ids, scores):
            copies.append(copy.deepcopy(cache))
            return scores

    cache = PagedCache(model.config, SPARSE, [0, 1])
    options = {"logits_processor": LogitsProcessorList([Copying()]), CACHE_NAME: cache}
    model.generate(tokens(1, 140), **options, **OPTIONS)
    more = tokens(1, 47, seed=5)
    _, fresh = in_pieces(model, tokens(1, 140), generation_cuts(model, 140, 140))
    expected, _ = in_pieces(model, more, [], fresh)
    assert copies[0].get_seq_length() == 140
    torch.testing.assert_close(in_pieces(model, more, [], copies[0])[0], expected, **EXACT)


def test_generations_in_two_threads_know_each_their_own_prompt(model):
    prompts, found = [tokens(1, 141), tokens(1, 133, seed=1)], {}

    def run(index):
        found[index] = model.generate(prompts[index], **OPTIONS)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert_same(found[index], model.generate(prompt, **OPTIONS))


def test_embeddings_as_a_prompt_end_where_the_tokens_do(model):
    prompt = tokens(1, 141)
    expected = model.generate(prompt, **OPTIONS)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **OPTIONS)
    assert torch.equal(got.sequences, expected.sequences[:, 141:])
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "rope_theta": 10000.0}


def long_rope(kind, original):
    """A model whose code drops the cache where the text first exceeds ``original`` tokens."""
    more = {"num_local_experts": 2} if kind == "Phimoe" else {}
    parameters = {**LONG, "original_max_position_embeddings": original}
    if kind == "Phimoe":
        parameters |= {"short_mscale": 1.0, "long_mscale": 1.0}
    # Experts are not computed in float64.
    return build(
        kind,
        dtype=torch.float32,
        original_max_position_embeddings=original,
        rope_parameters=parameters,
        head_dim=16,
        **more,
    )


@pytest.mark.parametrize("kind", ["Phi3", "Phimoe"])
def test_a_cache_that_the_model_puts_in_the_place_of_generates_own_is_settled(kind):
    model = long_rope(kind, 64)
    with operated(model, SPARSE):
        out = model.generate(tokens(1, 141), **OPTIONS)
        assert type(out[CACHE_NAME]) is PagedCache
        stop = out.sequences.shape[1] - 1
        expected, _ = in_pieces(model, out.sequences[:, :-1], generation_cuts(model, 141, stop))
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, 140:], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation),
    reason="this transformers goes on with a new cache and the last token alone",
)
def test_a_cache_that_is_replaced_while_decoding_knows_where_the_prompt_ended():
    with operated(long_rope("Phi3", 148), SPARSE) as model:
        out = model.generate(tokens(1, 141), **OPTIONS)
        rows = {tile: part["rows"] for tile, part in statistics(model).by_tile.items()}
        more = tokens(1, 45, seed=5)
        reset_statistics(model)
        model(more, **{CACHE_NAME: out[CACHE_NAME]})
        assert set(statistics(model).by_tile) == {str(TILE)}
    stop = out.sequences.shape[1] - 1
    again = 149  # tokens of the call that computes everything anew
    assert rows == {"8": 2 * 2 * 136, "1": 2 * ((again - 1 - 136) + (stop - 136))}


def test_eject_leaves_generate_as_it_was():
    model = build("Llama")
    before = set(model.__dict__)
    with operated(model, SPARSE):
        assert "generate" in model.__dict__
        assert copy.deepcopy(model).generate(tokens(1, 9), max_new_tokens=2).shape == (1, 11)
    assert set(model.__dict__) == before
    model.generate = lambda *args, **kwargs: "mine"
    with operated(model, SPARSE):
        assert model.generate() == "mine"
    assert model.__dict__["generate"]() == "mine"
    assert logits(model, tokens(1, 5)).isfinite().all()


def test_a_negative_prompt_has_an_end_of_its_own(model):
    """Guidance reads it with a cache of its own; rows behind either prompt are decode steps."""
    reset_statistics(model)
    negative = tokens(1, 101, seed=1)
    model.generate(tokens(1, 140), negative_prompt_ids=negative, guidance_scale=1.5, **OPTIONS)
    rows = {tile: part["rows"] for tile, part in statistics(model).by_tile.items()}
    layers = 2
    assert rows == {"8": layers * (136 + 96), "1": layers * (4 + 5 + 2 * (NEW - 1))}
