"""Questions over paragraphs, read from files in the formats of SQuAD and HotpotQA."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_surgery.errors import TextError
from llama_surgery.text import decoded

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
