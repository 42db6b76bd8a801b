"""Measuring the items of benchmarks/real.py, one batch at a time."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from real_forms import Form, Oracle
from real_results import NEEDLE, RULER, WINDOW, Results
from real_samples import Samples
from torch import nn

from llama_surgery.evaluation.evaluate import environment
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.needle import score_needles
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.evaluation.ruler.run import answer_samples
from llama_surgery.evaluation.ruler.tasks import TASKS


class Measure:
    """Measures items of a study and keeps what it finds.

    Args:
        model: The model.
        samples: The study's samples.
        results: Where results are kept.
        windows: How many are wanted.
        batch: Prompts that are answered together.
    """

    def __init__(
        self, model: nn.Module, samples: Samples, results: Results, windows: int, batch: int
    ) -> None:
        self._model, self._samples, self._results = model, samples, results
        self._batch = batch
        self._ids = samples.windows(max(1, windows))
        self._head = Head(model, self._ids[0])
        self._device = environment(model)["device"]

    def missing(self, form: Form, wanted: Sequence[str]) -> Iterator[int]:
        """Measures those items that are not there yet, batch by batch: yields how many each had."""
        there = self._results.items(form.name, form.settings)
        due = [item for item in wanted if item not in there]
        for kind, measure in ((WINDOW, self._windows), (NEEDLE, self._needles), (RULER, self._ruler)):
            items = [item for item in due if item.startswith(f"{kind} ")]
            if items:
                began = time.perf_counter()
                for found in measure(form, items):
                    seconds = round((time.perf_counter() - began) / len(found), 3)
                    for item, values in found.items():
                        about = {"seconds": seconds, "device": self._device}
                        self._results.add(form.name, form.settings, item, {**values, **about})
                    yield len(found)
                    began = time.perf_counter()

    def _windows(self, form: Form, items: Sequence[str]) -> Iterator[dict[str, Any]]:
        with form.running() as read:
            for item in items:
                window = self._ids[int(item.split()[1])][None]
                loss = perplexity(self._model, window, head=self._head).per_window[0]
                yield {item: {"loss": loss, **read()}}

    def _needles(self, form: Form, items: Sequence[str]) -> Iterator[dict[str, Any]]:
        prompts = {item: self._samples.needle(int(item.split()[1])) for item in items}

        def shape(item: str) -> tuple[int, ...]:
            return len(prompts[item].input_ids), len(prompts[item].answer_ids)

        with form.running():
            for batch in _batches(sorted(items, key=shape), shape, self._batch):
                right = score_needles(self._model, [prompts[item] for item in batch], len(batch))
                yield {item: {"right": answer} for item, answer in zip(batch, right, strict=True)}

    def _ruler(self, form: Form, items: Sequence[str]) -> Iterator[dict[str, Any]]:
        def answer_length(item: str) -> tuple[int, ...]:
            return (TASKS[item.split()[1]].new_tokens,)

        # Oracles know no padding, and prompts of a task differ by a few tokens.
        size = 1 if isinstance(form, Oracle) else self._batch
        with form.running():
            for batch in _batches(sorted(items, key=answer_length), answer_length, size):
                samples = [self._samples.ruler(item.split()[1], int(item.split()[2])) for item in batch]
                answers = answer_samples(self._model, self._samples.tokenizer, samples, len(batch))
                yield {
                    item: {"score": sample.score(answer), "answer": answer}
                    for item, sample, answer in zip(batch, samples, answers, strict=True)
                }


def _batches(items: Sequence[str], alike: Callable[[str], Any], size: int) -> Iterator[list[str]]:
    """Neighbours that are alike, at most ``size`` together."""
    for _, group in itertools.groupby(items, key=alike):
        found = list(group)
        for start in range(0, len(found), size):
            yield found[start : start + size]
