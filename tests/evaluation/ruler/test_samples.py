"""Generators: what they ask can be answered from the prompt, fits the length and depends on the seed."""

import random
import re

import pytest
from tests.evaluation.ruler.solvers import solve

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.materials import Materials, distinct_words
from llama_surgery.evaluation.ruler.tasks import READING, TASKS, Sampler

ALL = pytest.mark.parametrize("task", list(TASKS))


def test_there_are_the_thirteen_tasks_of_the_paper() -> None:
    assert len(TASKS) == 13
    assert [TASKS[task].new_tokens for task in TASKS] == [128] * 8 + [30, 120, 50, 32, 32]


@ALL
@pytest.mark.parametrize("length", [1536, 4096])
def test_a_reader_of_the_prompt_finds_the_references(task, length, tokenizer, materials) -> None:
    for sample in Sampler(tokenizer, materials).samples(task, length, range(3)):
        if task in READING:
            assert any(reference in sample.text for reference in sample.references)
        else:
            assert solve(sample) == set(sample.references)
        assert sample.score("") == 0
        assert sample.score(f"I say {', '.join(sample.references)}.".upper()) == 1


@ALL
def test_prompts_are_as_long_as_they_can_be(task, tokenizer, materials) -> None:
    sampler = Sampler(tokenizer, materials)
    for sample in sampler.samples(task, 2048, [0, 1]):
        assert len(sample.input_ids(tokenizer)) == sample.tokens
        assert sample.tokens + sample.new_tokens <= 2048
        unit = 8 if TASKS[task].unit_tokens < 2 else 4 * TASKS[task].unit_tokens  # prose: words
        assert sample.room < unit
        more = sampler._sample(task, TASKS[task], 2048, sample.index, sample.size + 1)
        assert more.room < 0


@ALL
def test_samples_depend_on_seed_and_index_alone(task, tokenizer, materials) -> None:
    several = Sampler(tokenizer, materials).samples(task, 1536, range(3))
    single = Sampler(tokenizer, materials).samples(task, 1536, [2])[0]
    assert several[2] == single
    assert len({sample.text for sample in several}) == 3
    assert Sampler(tokenizer, materials, seed=1).samples(task, 1536, [2])[0].text != single.text


@ALL
def test_any_tokenizer_and_chat_template(task, bytes_tokenizer, materials) -> None:
    for chat in (False, True):
        sample = Sampler(bytes_tokenizer, materials, chat=chat).samples(task, 8192, [0])[0]
        ids = sample.input_ids(bytes_tokenizer)
        assert len(ids) == sample.tokens <= 8192 - sample.new_tokens
        assert ids.count(0) == 1 and ids[0] == 0  # one first token, whoever put it there
        assert sample.text.startswith("<s>[user]") == chat
        assert ("[assistant]Answer:" in sample.text) == chat


def test_needles_stand_at_many_depths(tokenizer, materials) -> None:
    samples = Sampler(tokenizer, materials).samples("niah_single_2", 1536, range(30))
    depths = [sample.text.index("One of the special magic") / len(sample.text) for sample in samples]
    assert min(depths) < 0.2 and max(depths) > 0.8
    assert len({round(depth, 1) for depth in depths}) >= 7


def test_haystacks_are_what_they_are_called(tokenizer, materials) -> None:
    sampler = Sampler(tokenizer, materials)

    def facts(task: str) -> int:
        return sampler.samples(task, 4096, [0])[0].text.count("One of the special magic")

    assert [facts(f"niah_{kind}") for kind in ("single_1", "single_2", "multivalue", "multiquery")] == [
        1,
        1,
        4,
        4,
    ]
    assert facts("niah_multikey_1") == 4
    assert facts("niah_multikey_2") > 50 and facts("niah_multikey_3") > 15
    (uuids,) = sampler.samples("niah_multikey_3", 4096, [0])
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuids.references[0])


def test_common_words_occur_as_often_as_they_should(tokenizer, materials) -> None:
    (sample,) = Sampler(tokenizer, materials).samples("cwe", 8192, [0])
    entries = re.findall(r"\d+\. (\w+)", sample.text.rpartition("Below is")[2])
    assert {entries.count(word) for word in sample.references} == {30}
    assert {entries.count(word) for word in set(entries) - set(sample.references)} == {3}


def test_word_lists_grow_at_their_end() -> None:
    few, many = (distinct_words(random.Random(1), count) for count in (50, 6000))
    assert many[:50] == few and len(set(many)) == 6000


def test_haystack_text_can_be_given(tokenizer) -> None:
    own = Materials.of(["Snow fell. " * 20])
    (sample,) = Sampler(tokenizer, own).samples("niah_single_2", 1024, [0])
    assert sample.text.count("Snow fell.") > 100
    with pytest.raises(TextError, match="2 sentences: at least 10"):
        Materials.of(["Snow fell. It was cold."])


def test_what_cannot_be_made_is_refused(tokenizer, materials) -> None:
    sampler = Sampler(tokenizer, materials)
    with pytest.raises(TextError, match="task 'essay': there are niah_single_1"):
        sampler.samples("essay", 4096, [0])
    with pytest.raises(TextError, match=r"cwe does not fit into 512 tokens: its shortest .* take \d{3,}"):
        sampler.samples("cwe", 512, [0])
    with pytest.raises(TextError, match=r"qa_1: 81 samples .* has 80 questions"):
        sampler.samples("qa_1", 4096, [80])
    with pytest.raises(TextError, match="qa_2 needs a question file"):
        Sampler(tokenizer, Materials.of()).samples("qa_2", 4096, [0])
    with pytest.raises(TextError, match="no chat template"):
        Sampler(tokenizer, materials, chat=True)
