"""What the tasks are made of: running text, words, questions over paragraphs; and what is made of them."""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llama_surgery.errors import TextError
from llama_surgery.evaluation.needle_facts import SYLLABLES, WORDS
from llama_surgery.text import decoded

_ADJECTIVES = """
able bold brave brief bright brisk broad calm careful cheap civil clean clear clever close cold
common cool crisp curious damp dark deep distant dizzy dry dull eager early easy equal exact faint
fair famous fancy fast final firm flat fond fragile free fresh gentle glad grand grave great guilty
handy happy harsh heavy hidden hollow honest humble idle jolly keen kind large late lazy light
lively local lonely long loud lovely lucky mad mild modern modest narrow neat noble odd old open
patient plain polite proud pure quick quiet rapid rare ready rich rough round royal sharp shy silent
simple slow small smooth sober soft solid sour steady steep stiff strange strict strong subtle
sudden sunny sweet swift tall tame tender thick thin tidy tiny tired tough true useful vague vast
warm weary wild wise young
"""

#: Keys are one of these, a hyphen and one of :data:`~llama_surgery.evaluation.needle_facts.WORDS`.
ADJECTIVES = tuple(_ADJECTIVES.split())

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’')]))\s+")
_FORMATS = (
    'SQuAD ({"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}) and '
    'HotpotQA ([{"question", "answer", "context": [[title, [sentences]]]}])'
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its accepted answers, none of them blank.

    Attributes:
        gold: Indices of the documents that must be in the context.
        related: Indices of documents that resemble them and come in first as distractors.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions and the documents that hold their answers, each document once."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Materials:
    """Sources shared by all samples.

    Attributes:
        sentences: Of the running text, in order, white space collapsed; it is read round and round.
        questions: Question sets by task, ``qa_1`` and ``qa_2``; those not given are absent.
    """

    sentences: tuple[str, ...]
    questions: Mapping[str, QuestionSet] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, texts: Sequence[str] | None = None, questions: Mapping[str, QuestionSet] | None = None
    ) -> "Materials":
        """Materials of the given documents, or of the text that comes with the package.

        Raises:
            TextError: The documents hold fewer than ten sentences.
        """
        texts = [default_text()] if texts is None else texts
        sentences = tuple(s for text in texts for s in split_sentences(text))
        if len(sentences) < 10:
            raise TextError(
                f"the haystack text has {len(sentences)} sentences: at least 10 are needed. Give running "
                "prose, a book or more."
            )
        return cls(sentences, dict(questions or {}))


@functools.cache
def default_text() -> str:
    """The first chapters of Booker T. Washington, *Up from Slavery* (1901), in the public domain."""
    return files(__package__).joinpath("data", "haystack.txt").read_text(encoding="utf-8")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each with its white space collapsed."""
    return [s for s in _SENTENCE_END.split(" ".join(text.split())) if s]


def running_text(sentences: Sequence[str], words: int, start: int) -> list[str]:
    """``words`` words: sentences from number ``start`` on, round and round, the last one cut short."""
    taken: list[str] = []
    left = words
    while left > 0:
        sentence = sentences[(start + len(taken)) % len(sentences)].split(" ")
        taken.append(" ".join(sentence[:left]))
        left -= len(sentence)
    return taken


def distinct_keys(rng: random.Random, count: int) -> list[str]:
    """Different invented keys such as ``calm-falcon``; more adjectives where pairs do not suffice."""
    adjectives, available = 1, len(ADJECTIVES) * len(WORDS)
    while available < count:
        adjectives, available = adjectives + 1, available * len(ADJECTIVES)
    keys = []
    for number in rng.sample(range(available), count):
        number, noun = divmod(number, len(WORDS))
        parts = [WORDS[noun]]
        for _ in range(adjectives):
            number, adjective = divmod(number, len(ADJECTIVES))
            parts.insert(0, ADJECTIVES[adjective])
        keys.append("-".join(parts))
    return keys


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,}\b", default_text()))))


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """Different lower-case words, in random order: English ones, then invented ones if there are too few.

    The words of a smaller count are the first ones of a larger count, so that a prompt grows word by word.
    """
    words = rng.sample(_vocabulary(), len(_vocabulary()))
    return distinct(lambda: "".join(rng.choices(SYLLABLES, k=4)), count, words)


def distinct(draw: Callable[[], str], count: int, words: Sequence[str] = ()) -> list[str]:
    """``count`` different words: the given ones, then what is drawn until there are enough."""
    found = dict.fromkeys(words)
    while len(found) < count:
        found[draw()] = None
    return list(found)[:count]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample asked for.

    Attributes:
        rng: The sample's own, freshly seeded.
        size: How much haystack: words, lines, list entries or documents, as the task counts.
        index: Number of the sample.
        length: Tokens that prompt and answer may take together.
        seed: Of the whole run.
    """

    rng: random.Random
    size: int
    index: int
    length: int
    seed: int
    materials: Materials


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample before it is fitted to a length: the model goes on from ``prefix``, how the answer begins."""

    prompt: str
    prefix: str
    references: tuple[str, ...]

    def after(self, example: "Draft", answer: str) -> "Draft":
        """The sample behind an example with its answer."""
        worked = f"{example.prompt}\n{example.prefix} {answer}"
        return dataclasses.replace(self, prompt=f"{worked}\n\n\n{self.prompt}")


#: Makes a sample of the size asked for.
Builder = Callable[[Request], Draft]

#: Lines of a haystack without content.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def listed(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def scattered(rng: random.Random, lines: list[str], inserts: list[str]) -> list[str]:
    """``lines`` with each of ``inserts`` at a random place of its own, in the order given."""
    total = len(lines) + len(inserts)
    places = set(rng.sample(range(total), len(inserts)))
    rest, due = iter(lines), iter(inserts)
    return [next(due if place in places else rest) for place in range(total)]


class _Documents:
    """Numbers documents in order of first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, text: str) -> int:
        return self.numbers.setdefault(" ".join(text.split()), len(self.numbers))


def read_questions(path: str | Path) -> QuestionSet:
    """Reads a question file in JSON; its shape says which of the two formats it has.

    Unanswerable questions are left out. In SQuAD the paragraph of a question is gold and the others of
    its article are related; in HotpotQA all paragraphs of a question are gold, as they belong together.

    Raises:
        TextError: It is missing, not JSON, of another shape, or holds no question that has an answer.
    """
    path = Path(path)
    try:
        content = json.loads(decoded(path, path.read_bytes()))
    except OSError as error:
        raise TextError(
            f"{path}: cannot be read ({error.strerror}). Give a question file; read are {_FORMATS}."
        ) from error
    except TextError as error:
        raise TextError(f"{error} Read are {_FORMATS}.") from error
    except ValueError as error:
        raise TextError(f"{path}: not JSON ({error}). Read are {_FORMATS}.") from error
    read: Callable[[Any, _Documents], list[Question]] = _hotpot if isinstance(content, list) else _squad
    documents = _Documents()
    try:
        questions = read(content, documents)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TextError(f"{path}: unexpected shape ({error!r}). Read are {_FORMATS}.") from error
    if not questions:
        raise TextError(f"{path}: no question with an answer in it. Read are {_FORMATS}.")
    return QuestionSet(tuple(documents.numbers), tuple(questions))


def _squad(content: dict[str, Any], documents: _Documents) -> list[Question]:
    questions = []
    for article in content["data"]:
        numbers = [documents.add(paragraph["context"]) for paragraph in article["paragraphs"]]
        for own, paragraph in zip(numbers, article["paragraphs"], strict=True):
            related = tuple(number for number in dict.fromkeys(numbers) if number != own)
            for item in paragraph["qas"]:
                answers = _answers(answer["text"] for answer in item["answers"])
                if answers and not item.get("is_impossible", False):
                    questions.append(Question(item["question"].strip(), answers, (own,), related))
    return questions


def _hotpot(content: list[dict[str, Any]], documents: _Documents) -> list[Question]:
    questions = []
    for item in content:
        paragraphs = [f"{title}: {' '.join(sentences)}" for title, sentences in item["context"]]
        gold = tuple(dict.fromkeys(documents.add(paragraph) for paragraph in paragraphs))
        answers = _answers([item["answer"]])
        if answers and gold:
            questions.append(Question(item["question"].strip(), answers, gold, ()))
    return questions


def _answers(texts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
