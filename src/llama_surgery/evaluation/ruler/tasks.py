"""The thirteen tasks by name, their scores, and samples fitted to a length in the model's own tokens."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.generators import (
    common_words,
    frequent_words,
    needles,
    question_answering,
    variable_tracking,
)
from llama_surgery.evaluation.ruler.materials import Builder, Draft, Materials, Request
from llama_surgery.text import encode, leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, in whatever format, upper and lower case alike."""
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


@dataclasses.dataclass(frozen=True)
class RulerSample:
    """One question to answer.

    Attributes:
        length: Tokens asked for; ``tokens`` of the prompt and ``new_tokens`` of the answer are no more.
        index: Number of the sample within task and length.
        size: Units of haystack in it: words, lines, list entries or documents, as the task counts.
        text: The whole prompt, from chat template to unfinished answer.
        chat: Whether ``text`` holds a chat template, and with it all special tokens.
        references: What the answer must contain.
    """

    task: str
    length: int
    index: int
    size: int
    text: str
    chat: bool
    tokens: int
    new_tokens: int
    references: tuple[str, ...]

    @property
    def room(self) -> int:
        """Tokens that prompt and answer leave of ``length``; negative where they exceed it."""
        return self.length - self.tokens - self.new_tokens

    def input_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The prompt's tokens."""
        return _ids(tokenizer, self.text, self.chat)

    def score(self, answer: str) -> float:
        """Score of an answer, 0…1."""
        return task_of(self.task).score(answer, self.references)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool) -> list[int]:
    return ([] if chat else leading_tokens(tokenizer)) + encode(tokenizer, text)


class Sampler:
    """Makes samples; the same arguments give the same samples, one by one or all at once.

    Every sample gets as much haystack as fits: one unit more (a word of prose, a line, an entry of a list, a
    document) would exceed the length.

    Args:
        materials: Text and questions.
        seed: The same seed gives the same samples.
        chat: Put the prompt into the tokenizer's chat template, as instruction-tuned models expect.

    Raises:
        TextError: ``chat`` is asked for and the tokenizer has no template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", materials: Materials, *, seed: int = 0, chat: bool = False
    ) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise TextError(
                "chat: the tokenizer has no chat template. Leave it out: the model is a base model."
            )
        self.tokenizer, self.materials, self.seed, self.chat = tokenizer, materials, seed, chat
        self._sizes: dict[tuple[str, int], int] = {}

    def samples(self, name: str, length: int, indices: Sequence[int]) -> list[RulerSample]:
        """Samples of one task, those numbered ``indices``, of ``length`` tokens with their answers.

        Raises:
            TextError: There is no such task, the length is too small for it, or questions are lacking.
        """
        task = task_of(name)
        if (name, length) not in self._sizes:
            guess = max(0, int((length - task.new_tokens) / task.unit_tokens))
            self._sizes[name, length] = self._fitted(name, length, 0, guess).size
        return [self._fitted(name, length, index, self._sizes[name, length]) for index in indices]

    def _fitted(self, name: str, length: int, index: int, size: int) -> RulerSample:
        """The largest sample that fits, looked for from ``size`` on.

        A size that fits and the next one, which does not, are closed in on by the tokens that a unit takes on
        average; where that is slow, as units differ, by halves.
        """
        task = task_of(name)
        fits: RulerSample | None = None
        size, exceeds, steps = max(size, task.smallest), math.inf, 0
        while True:
            sample = self._sample(name, task, length, index, size)
            if sample.room >= 0:
                fits = sample
            elif size == task.smallest:
                raise TextError(
                    f"{name} does not fit into {length} tokens: its shortest prompt and the answer take "
                    f"{length - sample.room}. Use longer contexts or leave the task out."
                )
            else:
                exceeds = size
            if fits is not None and exceeds - fits.size <= 1:
                return fits
            steps += 1
            if steps > 4 and fits is not None and exceeds < math.inf:
                size = (fits.size + int(exceeds)) // 2
                continue
            units = sample.room * max(size, 1) / sample.tokens
            size += max(1, int(units)) if units >= 0 else min(-1, math.floor(units))
            low = task.smallest if fits is None else fits.size + 1
            size = max(low, min(size, int(exceeds) - 1) if exceeds < math.inf else size)

    def _sample(self, name: str, task: Task, length: int, index: int, size: int) -> RulerSample:
        rng = random.Random(f"{self.seed} {name} {length} {index}")
        draft = task.build(Request(rng, size, index, length, self.seed, self.materials))
        text = self._text(draft)
        tokens = len(_ids(self.tokenizer, text, self.chat))
        return RulerSample(
            name, length, index, size, text, self.chat, tokens, task.new_tokens, draft.references
        )

    def _text(self, draft: Draft) -> str:
        if not self.chat:
            return f"{draft.prompt}\n{draft.prefix}"
        turn = [{"role": "user", "content": draft.prompt}]
        opened = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return f"{opened}{draft.prefix}"
