"""Samples of a task, fitted to a length in the model's own tokens."""

import dataclasses
import math
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.draft import Draft, Request
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.tasks import Task, task_of
from llama_surgery.text import encode, leading_tokens

#: Sizes are tried in steps of about this share of a length.
_STEP = 0.02


@dataclasses.dataclass(frozen=True)
class RulerSample:
    """One question to answer.

    Attributes:
        task: Key of :data:`~llama_surgery.evaluation.ruler.tasks.TASKS`.
        length: Tokens asked for.
        index: Number of the sample within task and length.
        text: The whole prompt, from chat template to unfinished answer.
        chat: Whether ``text`` holds a chat template, and with it all special tokens.
        tokens: Of the prompt; with ``new_tokens`` at most ``length``.
        new_tokens: Tokens that the answer may take.
        references: What the answer must contain.
    """

    task: str
    length: int
    index: int
    text: str
    chat: bool
    tokens: int
    new_tokens: int
    references: tuple[str, ...]

    def input_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt's tokens."""
        return _ids(tokenizer, self.text, self.chat)

    def score(self, answer: str) -> float:
        """Score of an answer, 0…1."""
        return task_of(self.task).score(answer, self.references)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    return ([] if chat else leading_tokens(tokenizer)) + encode(tokenizer, text)


class Sampler:
    """Makes samples; the same arguments give the same samples, one by one or all at once.

    Args:
        tokenizer: The model's tokenizer.
        materials: Text and questions.
        seed: The same seed gives the same samples.
        chat: Put the prompt into the tokenizer's chat template, as instruction-tuned models expect.

    Raises:
        TextError: ``chat`` is asked for and the tokenizer has no template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, materials: Materials, *, seed: int = 0, chat: bool = False
    ) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise TextError(
                "chat: the tokenizer has no chat template. Leave it out: the model is a base model."
            )
        self.tokenizer, self.materials, self.seed, self.chat = tokenizer, materials, seed, chat
        self._sizes: dict[tuple[str, int], int] = {}

    def samples(self, name: str, length: int, indices: Sequence[int]) -> list[RulerSample]:
        """Samples of one task at one length.

        Args:
            name: The task.
            length: Tokens that prompt and answer may take together.
            indices: Numbers of the samples wanted.

        Raises:
            TextError: There is no such task, the length is too small for it, or questions are lacking.
        """
        task = task_of(name)
        if (name, length) not in self._sizes:
            self._sizes[name, length] = self._largest(name, task, length)
        return [self._sample(name, task, length, index) for index in indices]

    def _sample(self, name: str, task: Task, length: int, index: int) -> RulerSample:
        """The size that the first sample allows, less where this one comes out longer."""
        size = self._sizes[name, length]
        while True:
            draft = self._draft(name, task, length, index, size)
            text = self._text(draft)
            tokens = len(_ids(self.tokenizer, text, self.chat))
            if tokens + task.new_tokens <= length:
                return RulerSample(
                    name, length, index, text, self.chat, tokens, task.new_tokens, draft.references
                )
            if size <= task.smallest:
                raise TextError(_too_short(name, length, tokens + task.new_tokens))
            size = max(task.smallest, size - self._step(task, length))

    def _largest(self, name: str, task: Task, length: int) -> int:
        """Largest size at which the first sample fits."""

        def needed(steps: int) -> int:
            size = task.smallest + steps * step
            text = self._text(self._draft(name, task, length, 0, size))
            return len(_ids(self.tokenizer, text, self.chat)) + task.new_tokens

        step = self._step(task, length)
        if needed(0) > length:
            raise TextError(_too_short(name, length, needed(0)))
        low, high = 0, max(1, math.ceil(1 / _STEP))
        while needed(high) <= length:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= length else (low, middle)
        return task.smallest + low * step

    @staticmethod
    def _step(task: Task, length: int) -> int:
        return max(1, int(_STEP * length / task.unit_tokens))

    def _draft(self, name: str, task: Task, length: int, index: int, size: int) -> Draft:
        rng = random.Random(f"{self.seed} {name} {length} {index}")
        return task.build(Request(rng, size, index, length, self.seed, self.materials))

    def _text(self, draft: Draft) -> str:
        if not self.chat:
            return f"{draft.prompt}\n{draft.prefix}"
        turn = [{"role": "user", "content": draft.prompt}]
        opened = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return f"{opened}{draft.prefix}"


def _too_short(name: str, length: int, needed: int) -> str:
    return (
        f"{name} does not fit into {length} tokens: its shortest prompt and the answer take {needed}. Use "
        "longer contexts or leave the task out."
    )
