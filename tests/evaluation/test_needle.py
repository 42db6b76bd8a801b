import re
from collections import Counter

import pytest
import torch

from llama_surgery.errors import TextError
from llama_surgery.evaluation.needle import DEPTHS, NeedlePrompt, needle_prompts, score_needles
from llama_surgery.evaluation.needle_facts import FORMS, VARIANTS
from llama_surgery.evaluation.needle_haystack import cut_pieces
from llama_surgery.text import encode


@pytest.fixture(scope="module")
def prompts(tokenizer, texts) -> list[NeedlePrompt]:
    return needle_prompts(tokenizer, texts, count=100, lengths=[1024, 2048], seed=3)


def test_prompt_and_answer_together_have_the_length(prompts) -> None:
    for prompt in prompts:
        assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length


def test_forms_lengths_and_depths_are_balanced(prompts) -> None:
    assert set(Counter(p.form for p in prompts).values()) == {20}
    assert set(Counter(p.length for p in prompts).values()) == {50}
    assert Counter(p.depth for p in prompts) == dict.fromkeys(DEPTHS, 10)
    assert len({p.name for p in prompts}) > 90


def test_fact_stands_at_its_depth_and_the_answer_is_in_it_alone(tokenizer, prompts) -> None:
    for prompt in prompts:
        text = tokenizer.decode(prompt.input_ids)
        value = tokenizer.decode(prompt.answer_ids).strip()
        form = FORMS[prompt.form]
        fact = form.fact.format(name=prompt.name, value=value)
        assert text.count(f"\n\n{fact}\n\n") == 1
        assert text.endswith("\n\n" + form.question.format(name=prompt.name))
        before, behind = text.split(fact)
        place = len(encode(tokenizer, before)) / prompt.length
        assert place == pytest.approx(prompt.depth, abs=0.04)
        haystack = before + behind.removesuffix(form.question.format(name=prompt.name))
        assert prompt.name not in haystack
        assert not re.search(rf"\b{value}\b", haystack.lower())


def test_answer_is_tokenised_as_in_running_text(tokenizer, prompts) -> None:
    for prompt in prompts[:20]:
        ids = [*prompt.input_ids, *prompt.answer_ids]
        # The first tokens may be the rest of a word: compare from the second paragraph on.
        text = tokenizer.decode(ids)
        tail = encode(tokenizer, text[text.index("\n\n") :])
        assert ids[-len(tail) :] == tail


def test_haystacks_are_runs_of_one_text(texts, tokenizer, prompts) -> None:
    for prompt in prompts[:20]:
        text = tokenizer.decode(prompt.input_ids)
        fact = FORMS[prompt.form].fact.split("{value}")[0].format(name=prompt.name)
        before = text[: text.index(fact)].strip()
        assert any(before in whole for whole in texts)


def test_prompts_depend_on_the_seed_alone(tokenizer, texts, prompts) -> None:
    again = needle_prompts(tokenizer, texts, count=100, lengths=[1024, 2048], seed=3)
    assert again == prompts
    other = needle_prompts(tokenizer, texts, count=100, lengths=[1024, 2048], seed=4)
    assert {p.name for p in other} != {p.name for p in prompts}


@pytest.mark.parametrize("depth", [0.0, 1.0])
@pytest.mark.parametrize("length", [128, 4096])
def test_fact_is_whole_at_the_ends(tokenizer, texts, depth: float, length: int) -> None:
    for prompt in needle_prompts(tokenizer, texts, count=10, lengths=[length], depths=[depth], seed=0):
        text = tokenizer.decode(prompt.input_ids)
        value = tokenizer.decode(prompt.answer_ids).strip()
        assert FORMS[prompt.form].fact.format(name=prompt.name, value=value) in text
        assert len(prompt.input_ids) + len(prompt.answer_ids) == length


def test_too_little_text_says_how_much_is_needed(tokenizer, texts) -> None:
    with pytest.raises(TextError, match=r"haystack of \d+ tokens is needed .* longest of 3 has \d+"):
        needle_prompts(tokenizer, texts, count=1, lengths=[100_000], seed=0)
    with pytest.raises(TextError, match="use contexts of at least"):
        needle_prompts(tokenizer, texts, count=1, lengths=[64], seed=0)


@pytest.mark.parametrize(
    ("count", "lengths", "depths"), [(0, [512], [0.5]), (1, [], [0.5]), (1, [512], []), (1, [512], [1.5])]
)
def test_senseless_grids_are_refused(tokenizer, texts, count, lengths, depths) -> None:
    with pytest.raises(TextError, match="between 0 and 1"):
        needle_prompts(tokenizer, texts, count=count, lengths=lengths, depths=depths, seed=0)


@pytest.mark.parametrize("text", ["", "x" * 2000, "One. Two.\n\n\nThree\nfour\n\n" * 9, "long words " * 300])
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = list(cut_pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 200 for piece in pieces)


def greedy(model, prompt: NeedlePrompt) -> list[int]:
    """Token by token, without a cache."""
    ids = list(prompt.input_ids)
    for _ in prompt.answer_ids:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt.input_ids) :]


def test_scoring_is_exact_match_of_greedy_generation(tokenizer, texts, tiny_llama) -> None:
    prompts = needle_prompts(tokenizer, texts, count=6, lengths=[128, 192], seed=0)
    # A random model answers nothing; what it would say is made the right answer for every second.
    told = []
    changed = []
    for index, prompt in enumerate(prompts):
        said = greedy(tiny_llama, prompt)
        if index % 2:
            said[-1] = (said[-1] + 1) % 4096
        fields = {**vars(prompt), "answer_ids": tuple(said)}
        changed.append(NeedlePrompt(**fields))
    # Settings of the model's own must not matter.
    tiny_llama.generation_config.repetition_penalty = 1.8
    tiny_llama.generation_config.do_sample = True
    expected = [True, False] * 3
    assert score_needles(tiny_llama, changed, progress=lambda *step: told.append(step)) == expected
    assert score_needles(tiny_llama, changed, batch_size=4) == expected
    assert told == [("needles", done, 6) for done in range(1, 7)]


def test_text_that_ends_early_is_no_answer(tokenizer, texts, tiny_llama) -> None:
    (prompt,) = needle_prompts(tokenizer, texts, count=1, lengths=[128], seed=0)
    said = greedy(tiny_llama, prompt)
    ends = NeedlePrompt(**{**vars(prompt), "answer_ids": (*said, 5, 6)})
    tiny_llama.generation_config.eos_token_id = said[0]
    assert score_needles(tiny_llama, [ends]) == [False]
    assert score_needles(tiny_llama, []) == []


def said_in(tokenizer, prompt: NeedlePrompt) -> list[tuple[str, str]]:
    """Names and values of the facts of the prompt's form, in order, distractors of the text among them."""
    wording = re.escape(FORMS[prompt.form].fact).replace(r"\{name\}", "([A-Z][a-z]+)")
    wording = wording.replace(r"\{value\}", r"(\w+)")
    # The longest prompt: answered questions repeat a fact, but not as a paragraph of its own.
    ids = prompt.then[-1][0] if prompt.then else prompt.input_ids
    return re.findall(rf"(?<=\n\n){wording}(?=\n\n)", tokenizer.decode(ids))


@pytest.fixture(scope="module")
def harder(tokenizer, texts) -> list[NeedlePrompt]:
    return needle_prompts(tokenizer, texts, count=100, lengths=[1024, 2048], variants=list(VARIANTS), seed=7)


def test_variants_share_out_forms_and_lengths(harder) -> None:
    assert Counter(p.variant for p in harder) == dict.fromkeys(VARIANTS, 20)
    assert set(Counter((p.variant, p.form) for p in harder).values()) == {4}
    assert {p.kind for p in harder if p.form == "treasure"} == {"word"}
    assert {p.kind for p in harder if p.form == "secret number"} == {"number"}


def test_every_fact_of_a_variant_is_whole_and_its_own(tokenizer, harder) -> None:
    for prompt in harder:
        facts = said_in(tokenizer, prompt)
        assert len(facts) >= VARIANTS[prompt.variant].facts
        value = tokenizer.decode(prompt.answer_ids).strip()
        assert facts.count((prompt.name, value)) == 1
        assert [name for name, _ in facts].count(prompt.name) == 1
        assert [said for _, said in facts].count(value) == 1


def test_names_that_look_alike_differ_in_one_character(tokenizer, harder) -> None:
    for prompt in harder:
        if prompt.variant == "alike-names":
            names = [name for name, _ in said_in(tokenizer, prompt)]
            off = [
                name
                for name in names
                if len(name) == len(prompt.name)
                and sum(a != b for a, b in zip(name, prompt.name, strict=True)) == 1
            ]
            assert len(set(off)) >= 3


def test_two_are_asked_and_the_second_prompt_holds_the_first_answer(tokenizer, harder) -> None:
    for prompt in harder:
        if prompt.variant != "two-asked":
            assert prompt.then == ()
            continue
        ((ids, answer),) = prompt.then
        assert len(ids) + len(answer) == prompt.length
        first = len(prompt.input_ids)
        assert ids[:first] == prompt.input_ids
        assert ids[first : first + len(prompt.answer_ids)] == prompt.answer_ids
        facts = said_in(tokenizer, prompt)
        asked = tokenizer.decode(ids).rpartition("\n\n")[2]
        said = tokenizer.decode(answer).strip()
        (name,) = (name for name, value in facts if value == said)
        assert name != prompt.name and asked == FORMS[prompt.form].question.format(name=name)


def test_both_answers_must_be_right(tokenizer, texts, tiny_llama) -> None:
    (prompt,) = needle_prompts(tokenizer, texts, count=1, lengths=[512], variants=["two-asked"], seed=0)
    first = greedy(tiny_llama, prompt)
    then = NeedlePrompt(**{**vars(prompt), "input_ids": prompt.then[0][0], "answer_ids": prompt.then[0][1]})
    second = greedy(tiny_llama, then)
    for changed, right in (((0, 0), True), ((1, 0), False), ((0, 1), False)):
        answers = [
            (*said[:-1], (said[-1] + off) % 4096) for said, off in zip((first, second), changed, strict=True)
        ]
        fields = {**vars(prompt), "answer_ids": answers[0], "then": ((prompt.then[0][0], answers[1]),)}
        assert score_needles(tiny_llama, [NeedlePrompt(**fields)]) == [right]


@pytest.mark.parametrize("variants", [[], ["no-such-variant"]])
def test_unknown_variants_are_refused(tokenizer, texts, variants) -> None:
    with pytest.raises(TextError, match="one-fact, four-facts"):
        needle_prompts(tokenizer, texts, count=1, lengths=[512], variants=variants, seed=0)


def test_too_many_facts_for_the_length_are_refused(tokenizer, texts) -> None:
    with pytest.raises(TextError, match="16 facts of"):
        needle_prompts(tokenizer, texts, count=1, lengths=[256], variants=["sixteen-facts"], seed=0)
