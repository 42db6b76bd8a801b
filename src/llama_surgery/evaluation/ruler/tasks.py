"""The thirteen tasks by name, and scores of answers: whether references occur. Format does not count."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.generators import (
    common_words,
    frequent_words,
    needles,
    question_answering,
    variable_tracking,
)
from llama_surgery.evaluation.ruler.materials import Builder


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, upper and lower case alike: 0…1."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the answer, else 0."""
    answer = answer.lower()
    return float(any(reference.lower() in answer for reference in references))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question, whose answer may take ``new_tokens``.

    Attributes:
        build: Makes a sample of a given size.
        unit_tokens: Roughly the tokens that one unit of size adds to a prompt.
        smallest: Least size that makes sense.
        score: Score of an answer, 0…1, given the references.
    """

    build: Builder
    new_tokens: int
    unit_tokens: float
    smallest: int = 0
    score: Callable[[str, Sequence[str]], float] = string_match_all


def _niah(unit_tokens: float, **kind: Any) -> Task:
    return Task(build=partial(needles, **kind), new_tokens=128, unit_tokens=unit_tokens, smallest=1)


def _reading(task: str, unit_tokens: float) -> Task:
    build = partial(question_answering, task=task)
    return Task(build=build, new_tokens=32, unit_tokens=unit_tokens, smallest=1, score=string_match_part)


_PROSE, _LINE, _UUIDS = 1.4, 25, 90

#: In the order of the paper's tables.
TASKS: dict[str, Task] = {
    "niah_single_1": _niah(_LINE, haystack="noise"),
    "niah_single_2": _niah(_PROSE, haystack="prose"),
    "niah_single_3": _niah(_PROSE, haystack="prose", value="uuid"),
    "niah_multikey_1": _niah(_PROSE, haystack="prose", keys=4),
    "niah_multikey_2": _niah(_LINE, haystack="needles"),
    "niah_multikey_3": _niah(_UUIDS, haystack="needles", key="uuid", value="uuid"),
    "niah_multivalue": _niah(_PROSE, haystack="prose", values=4),
    "niah_multiquery": _niah(_PROSE, haystack="prose", keys=4, queries=4),
    "vt": Task(build=variable_tracking, new_tokens=30, unit_tokens=_LINE),
    "cwe": Task(build=common_words, new_tokens=120, unit_tokens=18, smallest=20),
    "fwe": Task(build=frequent_words, new_tokens=50, unit_tokens=4, smallest=100),
    "qa_1": _reading("qa_1", 150),
    "qa_2": _reading("qa_2", 120),
}

#: Tasks that need a file of questions.
READING = ("qa_1", "qa_2")


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        TextError: There is none.
    """
    if name not in TASKS:
        raise TextError(f"task {name!r}: there are {', '.join(TASKS)}.")
    return TASKS[name]
