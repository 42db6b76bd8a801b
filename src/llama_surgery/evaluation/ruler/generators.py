"""What makes the samples: needles in eight ways, chains of variables, counting of words, questions."""

import math
import random
import string
import uuid
from collections.abc import Sequence
from typing import Literal

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.materials import (
    NOISE,
    Draft,
    Materials,
    QuestionSet,
    Request,
    distinct,
    distinct_keys,
    distinct_words,
    listed,
    running_text,
    scattered,
)

Haystack = Literal["noise", "prose", "needles"]
Kind = Literal["word", "number", "uuid"]

#: In prose, needles stand at this many evenly spaced depths, at most one at each.
DEPTHS = 40


def needles(
    request: Request,
    *,
    haystack: Haystack,
    key: Kind = "word",
    value: Kind = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    """One kind of needle task.

    Args:
        haystack: What surrounds the needles: a repeated line, running text, or needles about other keys.
        key: What the needles are about.
        value: What they say of it.
        keys: Keys with a needle.
        values: Needles of each key.
        queries: Keys that are asked for; all their values are the answer.
    """
    rng = request.rng
    # Drawn before the haystack, so that its size does not change what is asked.
    own_keys = _distinct(rng, key, keys)
    own_values = _distinct(rng, value, keys * values)
    facts = [
        _fact(own_keys[number // values], fact_value, value) for number, fact_value in enumerate(own_values)
    ]
    asked = sorted(rng.sample(range(keys), queries))
    references = [v for number in asked for v in own_values[number * values : (number + 1) * values]]
    rng.shuffle(facts)
    if haystack == "prose":
        context = _in_prose(request, facts)
    elif haystack == "noise":
        context = "\n".join(scattered(rng, [NOISE] * request.size, facts))
    else:
        context = "\n".join(
            scattered(rng, _others(rng, key, value, own_keys, own_values, request.size), facts)
        )
    several = len(references) > 1
    names = listed([own_keys[number] for number in asked])
    what = f"special magic {value}{'s' if several else ''} for {names}"
    verb = "are" if several else "is"
    prompt = (
        f"Some special magic {value}s are hidden in the text below. Keep them in mind, since there is a "
        f"question about them at its end.\n\n{context}\n\nQuestion: what {verb} the {what}, as the text "
        f"above has {'them' if several else 'it'}?"
    )
    return Draft(prompt, f"Answer: according to the text, the {what} {verb}", tuple(references))


def _fact(key: str, value: str, kind: Kind) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _distinct(rng: random.Random, kind: Kind, count: int) -> list[str]:
    if kind == "word":
        return distinct_keys(rng, count)
    if kind == "number":
        return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _others(
    rng: random.Random, key: Kind, value: Kind, own_keys: list[str], own_values: list[str], count: int
) -> list[str]:
    """Needles about keys and with values that are not those of the sample."""
    spare = count + len(own_keys) + len(own_values)
    other_keys = [k for k in _distinct(rng, key, spare) if k not in own_keys]
    other_values = [v for v in _distinct(rng, value, spare) if v not in own_values]
    return [_fact(k, v, value) for k, v in zip(other_keys[:count], other_values, strict=False)]


def _in_prose(request: Request, facts: list[str]) -> str:
    rng, sentences = request.rng, request.materials.sentences
    start = rng.randrange(len(sentences))
    depths = sorted(rng.sample(range(DEPTHS), len(facts)))
    text = running_text(sentences, request.size, start)
    for depth, fact in sorted(zip(depths, facts, strict=True), reverse=True):
        text.insert(round(depth / (DEPTHS - 1) * len(text)), fact)
    return " ".join(text)


#: Noise lines of the worked example that comes first.
EXAMPLE_LINES = 6
#: Times the value is handed on.
HOPS = 4


def variable_tracking(request: Request) -> Draft:
    """One chain of assignments among noise; all its variables are the answer."""
    example = _chain(request.rng, EXAMPLE_LINES, letters=3)
    return _chain(request.rng, request.size, letters=5).after(example, " ".join(example.references))


def _chain(rng: random.Random, lines: int, letters: int) -> Draft:
    chain = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), HOPS + 1)
    value = rng.randrange(10_000, 99_999)
    sources = [str(value), *(f"VAR {name}" for name in chain)]
    statements = [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
    context = "\n".join(scattered(rng, [NOISE] * lines, statements))
    prompt = (
        "Variables are assigned in some lines of the text below, by a value or by another variable. Keep "
        f"track of them.\n\n{context}\n\nQuestion: which variables hold the value {value}, be it "
        "directly or by way of others?"
    )
    prefix = f"Answer: the value {value} is held by these {HOPS + 1} variables:"
    return Draft(prompt, prefix, tuple(chain))


#: Below this length common words have fewer entries, since more would not fit.
SHORT = 4096
COMMON = 10
ZETA_2 = math.pi**2 / 6


def common_words(request: Request) -> Draft:
    """Ten words occur often in a numbered list, all others seldom. ``size`` counts words."""
    rng, short = request.rng, request.length < SHORT
    words, common = _words(rng, request.size)
    example = _common(rng, *_words(rng, 20 if short else 40), *((3, 1) if short else (10, 3)))
    draft = _common(rng, words, common, *((6, 1) if short else (30, 3)))
    return draft.after(example, _numbered(example.references))


def _words(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """Different words, and the first ten of them that are no part of another."""
    words = distinct_words(rng, max(count, 2 * COMMON))
    joined = "\n".join(words)
    common = [word for word in words if joined.count(word) == 1][:COMMON]
    rare = [word for word in words if word not in set(common)]
    return common + rare[: max(0, count - COMMON)], common


def _common(rng: random.Random, words: list[str], common: list[str], often: int, seldom: int) -> Draft:
    entries = [word for word in words for _ in range(often if word in set(common) else seldom)]
    rng.shuffle(entries)
    prompt = (
        "Below is a numbered list of words. Some of them occur much more often than the others. Keep those "
        f"in mind.\n\n{_numbered(entries)}\n\nQuestion: which {COMMON} words are the most frequent ones of "
        "the list?"
    )
    return Draft(prompt, f"Answer: the {COMMON} most frequent words of the list are:", tuple(common))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(request: Request) -> Draft:
    """Invented words with Zipf frequencies; the answer is the three most frequent ones.

    ``size`` counts the entries. The word of rank k occurs size / (k² · ζ(2)) times; rank 1 is a row of
    dots, to be ignored.
    """
    rng, vocabulary = request.rng, max(4, (request.length - 50) // 50)
    words = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), vocabulary)
    ranked = ["...", *words[1:]]
    entries = [
        word
        for rank, word in enumerate(ranked, start=1)
        for _ in range(int(request.size / (rank**2 * ZETA_2)))
    ]
    rng.shuffle(entries)
    prompt = (
        "Below is a text in a code. Count its words and leave the rows of dots aside.\n\n"
        f"{' '.join(entries)}\n\nQuestion: which three code words are the most frequent ones of the text?"
    )
    prefix = "Answer: the three most frequent code words are:"
    return Draft(prompt, prefix, tuple(ranked[1:4]))


_INSTRUCTION = (
    "Answer the question from the documents{place}. Give the answer alone, in as few words as it takes."
)


def questions_for(task: str, materials: Materials, count: int) -> QuestionSet:
    """The question set of a task, if it holds questions for ``count`` samples.

    Raises:
        TextError: None was given, or it holds fewer: a question is asked once.
    """
    chosen = materials.questions.get(task)
    if chosen is None:
        raise TextError(
            f"{task} needs a question file: none was given. Give the path of one in the format of SQuAD or "
            f"HotpotQA for {task}, or leave the task out."
        )
    if count > len(chosen.questions):
        raise TextError(
            f"{task}: {count} samples were asked for, but the question file has {len(chosen.questions)} "
            "questions that can be answered. Ask for fewer samples or leave the task out."
        )
    return chosen


def question_answering(request: Request, *, task: str) -> Draft:
    """A question of the set that is given for ``task``. ``size`` counts documents."""
    chosen = questions_for(task, request.materials, request.index + 1)
    order = random.Random(f"{request.seed} {task}").sample(
        range(len(chosen.questions)), len(chosen.questions)
    )
    question = chosen.questions[order[request.index]]
    numbers = list(question.gold)
    taken = {*question.gold, *question.related}
    others = [number for number in range(len(chosen.documents)) if number not in taken]
    request.rng.shuffle(others)
    distractors = [*question.related, *others]
    missing = request.size - len(numbers)
    if missing > 0:
        if not distractors:
            raise TextError(f"{task}: the question file has no document beside that of the question.")
        # A file with little text is read round and round; the gold documents stay single.
        rounds = -(-missing // len(distractors))
        numbers += (distractors * rounds)[:missing]
    request.rng.shuffle(numbers)
    documents = [f"Document {i}:\n{chosen.documents[n]}" for i, n in enumerate(numbers, start=1)]
    prompt = "\n\n".join(
        [
            _INSTRUCTION.format(place=" below"),
            *documents,
            _INSTRUCTION.format(place=" above"),
            f"Question: {question.text}",
        ]
    )
    return Draft(prompt, "Answer:", question.answers)
