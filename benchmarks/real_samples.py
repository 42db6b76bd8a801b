"""What benchmarks/real.py measures on: a split of the text, windows, planted facts and RULER samples."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError
from llama_surgery.evaluation.needle import NeedlePrompt, needle_prompts
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.tasks import READING, TASKS, RulerSample, Sampler
from llama_surgery.files import write_atomically
from llama_surgery.text import read_texts, windows

#: RULER tasks that need no file of questions.
RULER_TASKS = tuple(name for name in TASKS if name not in READING)
#: Prompts are planted, and RULER samples made, so many at a time. Each time has a seed of its own, so that
#: more samples are added to those that were there. 50 prompts have every wording and depth equally often.
NEEDLES, RULER = 50, 5


def split(text: Path, calibration: Path | None) -> tuple[list[str], list[str]]:
    """Documents to calibrate and learn on, and documents to measure on.

    Without separate text for calibration every other document is for that, in order of their names, from the
    first on.

    Raises:
        TextError: There is no text, or a single document for both.
    """
    texts = read_texts(text)
    if calibration is not None:
        return read_texts(calibration), texts
    if len(texts) < 2:
        raise TextError(f"{text} holds one document: give another text as --calibration-text.")
    return texts[::2], texts[1::2]


class Samples:
    """Samples by number, made when they are asked for and kept in a folder.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents to measure on.
        length: Tokens of a window, and of prompt and answer together.
        seed: Of everything.
        chat: Whether RULER prompts are put into the tokenizer's chat template.
        folder: Where prompts are kept: to make them takes a while.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        length: int,
        seed: int,
        chat: bool,
        folder: Path,
    ) -> None:
        self.tokenizer, self.length = tokenizer, length
        self._texts, self._seed, self._folder = texts, seed, folder
        self._sampler = Sampler(tokenizer, Materials.of(), seed=seed, chat=chat)
        self._made: dict[str, list[dict[str, Any]]] = {}

    def windows(self, count: int) -> torch.Tensor:
        """(count, length) int64: the first windows, whatever the count, are the same.

        Raises:
            TextError: The documents do not hold so many.
        """
        return windows(self.tokenizer, self._texts, self.length, count, self._seed)

    def needle(self, number: int) -> NeedlePrompt:
        """A planted fact and its question."""
        batch, place = divmod(number, NEEDLES)

        def plant() -> list[NeedlePrompt]:
            seed = 10_000 * self._seed + batch
            return needle_prompts(
                self.tokenizer, self._texts, count=NEEDLES, lengths=[self.length], seed=seed
            )

        return NeedlePrompt(**_tuples(self._kept(f"needles-{batch}", plant)[place]))

    def ruler(self, task: str, number: int) -> RulerSample:
        """A sample of a RULER task."""
        batch, place = divmod(number, RULER)

        def make() -> list[RulerSample]:
            indices = range(batch * RULER, (batch + 1) * RULER)
            return self._sampler.samples(task, self.length, indices)

        return RulerSample(**_tuples(self._kept(f"{task}-{batch}", make)[place]))

    def _kept(self, name: str, make: Callable[[], Sequence[Any]]) -> list[dict[str, Any]]:
        if name not in self._made:
            file = self._folder / f"{name}.json"
            if not file.exists():
                content = json.dumps([dataclasses.asdict(sample) for sample in make()])
                write_atomically(file, lambda path: path.write_text(content, encoding="utf-8"))
            self._made[name] = json.loads(file.read_text(encoding="utf-8"))
        return self._made[name]


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
