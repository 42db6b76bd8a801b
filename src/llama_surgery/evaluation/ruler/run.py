"""Answering samples, and whole runs that can be interrupted."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

import llama_surgery
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import (
    check_dense,
    environment,
    model_name,
    versions,
)
from llama_surgery.evaluation.generation import continue_greedily, end_tokens
from llama_surgery.evaluation.io import Progress
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.reading import questions_for
from llama_surgery.evaluation.ruler.result import Cell, RulerResult
from llama_surgery.evaluation.ruler.samples import RulerSample, Sampler
from llama_surgery.evaluation.ruler.tasks import READING, task_of
from llama_surgery.surgery.context import context_length
from llama_surgery.topology.router import PageRouter

#: Samples of a cell that are answered before the next cell has its turn.
TURN = 25
#: Seconds after which results are saved within a turn, as soon as a batch is answered.
SAVE_AFTER = 10.0


def answer_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[RulerSample],
    batch_size: int = 1,
) -> list[str]:
    """Lets a model answer by greedy ``generate()``.

    An answer that has all its references ends there: what would follow could not change its score.

    Args:
        model: A causal language model of transformers, dense or operated.
        tokenizer: Its tokenizer.
        samples: What to answer.
        batch_size: Samples that are answered together.

    Returns:
        For each sample, what was written.
    """
    answers: list[str] = []
    ends = end_tokens(model)

    def text(row: Sequence[int]) -> str:
        return str(tokenizer.decode([token for token in row if token not in ends]))

    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]

        def enough(index: int, row: list[int], batch: Sequence[RulerSample] = batch) -> bool:
            return batch[index].score(text(row)) == 1

        prompts = [sample.input_ids(tokenizer) for sample in batch]
        longest = max(sample.new_tokens for sample in batch)
        rows = continue_greedily(model, prompts, longest, enough=enough)
        answers += [text(row[: sample.new_tokens]) for sample, row in zip(batch, rows, strict=True)]
    return answers


def run_ruler(
    model: nn.Module,
    sampler: Sampler,
    *,
    configs: Mapping[str, SurgeryConfig],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 100,
    routers: Mapping[int, PageRouter] | None = None,
    batch_size: int = 1,
    file: str | Path | None = None,
    turn: int = TURN,
    deadline: float | None = None,
    progress: Progress | None = None,
) -> RulerResult:
    """Answers the same samples with the dense model and with each configuration.

    Cells take turns, so that a run which is cut short has answered all tasks and lengths alike. What is
    answered is saved; the same call goes on where an interrupted one stopped.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It comes back dense.
        sampler: Makes the samples.
        configs: What to measure, by name, thresholds set.
        tasks: Names of tasks.
        lengths: Tokens of prompt and answer together.
        samples: Samples of each task at each length.
        routers: Learned corrections by layer index, used with every configuration, or None.
        batch_size: Samples that are answered together.
        file: JSON file of the results, read first if it exists; None for nowhere.
        turn: Samples of a cell that are answered before the next cell has its turn.
        deadline: ``time.monotonic()`` after which no further turn is begun.
        progress: Told as ``progress(stage, samples done, samples in all)``.

    Raises:
        SurgeryError: The model is operated, in training mode or not made for such lengths, or ``file`` holds
            another run.
        TextError: A task does not exist, or its samples cannot be made.
    """
    check_dense(model, configs)
    if min(samples, batch_size, turn) < 1 or not tasks or not lengths:
        raise SurgeryError(
            f"{samples} samples of tasks {list(tasks)} at lengths {list(lengths)}, in batches of "
            f"{batch_size} and turns of {turn}: at least one of each is needed."
        )
    tasks, lengths = list(dict.fromkeys(tasks)), sorted(set(lengths))
    context = context_length(model)
    if context is not None and lengths[-1] > context:
        raise SurgeryError(
            f"{lengths[-1]} tokens: {model_name(model)} was made for {context}. Leave longer lengths out."
        )
    settings = _settings(model, sampler, configs, tasks, lengths, samples, routers, batch_size)
    result = RulerResult(settings) if file is None else RulerResult.load(file, settings)
    _check_samples(sampler, tasks, lengths, samples)
    forms: dict[str, SurgeryConfig | None] = {DENSE: None, **configs}
    saver = _Saver(result, file)
    if not result.complete and environment(model) not in result.environments:
        result.environments.append(environment(model))
    for start in range(0, samples, turn):
        indices = range(start, min(start + turn, samples))
        for length in lengths:
            for task in tasks:
                due = {
                    name: config
                    for name, config in forms.items()
                    if len(result.cell(name, task, length).scores) < indices.stop
                }
                if deadline is not None and due and time.monotonic() > deadline:
                    return result
                block = sampler.samples(task, length, indices) if due else []
                for name, config in due.items():
                    cell = result.cell(name, task, length)
                    rest = block[len(cell.scores) - start :]
                    with (
                        nullcontext()
                        if config is None
                        else llama_surgery.operated(model, config, routers=routers)
                    ):
                        for _ in _answer(model, sampler.tokenizer, rest, cell, batch_size):
                            saver.save()
                    saver.save(now=True)
                    if progress is not None:
                        done = sum(len(cell.scores) for cell in result.cells if cell.name == name)
                        progress(f"{name}: RULER", done, samples * len(tasks) * len(lengths))
    return result


class _Saver:
    """Writes results as they come, not more often than every few seconds."""

    def __init__(self, result: RulerResult, file: str | Path | None) -> None:
        self._result, self._file, self._last = result, file, time.monotonic()

    def save(self, *, now: bool = False) -> None:
        if self._file is not None and (now or time.monotonic() > self._last + SAVE_AFTER):
            self._result.write_json(self._file)
            self._last = time.monotonic()


def _check_samples(sampler: Sampler, tasks: Sequence[str], lengths: Sequence[int], samples: int) -> None:
    """What cannot be made is said before anything is answered."""
    for task in tasks:
        task_of(task)
    for task in READING:
        if task in tasks:
            questions_for(task, sampler.materials, samples)
    for task in tasks:
        for length in lengths:
            sampler.samples(task, length, [0])


def _answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[RulerSample],
    cell: Cell,
    batch_size: int,
) -> Iterator[None]:
    """Adds the answers to ``samples`` to ``cell``, batch by batch."""
    before = dict(cell.pairs)
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        began = time.perf_counter()
        answers = answer_samples(model, tokenizer, batch, batch_size)
        cell.seconds += time.perf_counter() - began
        cell.answers += answers
        cell.scores += [sample.score(answer) for sample, answer in zip(batch, answers, strict=True)]
        if llama_surgery.is_operated(model):  # counted since it was operated, for this call
            read = llama_surgery.statistics(model)
            cell.pairs["read"] = before.get("read", 0.0) + read.total_density * read.causal_pairs
            cell.pairs["causal"] = before.get("causal", 0.0) + read.causal_pairs
        yield


def _settings(
    model: nn.Module,
    sampler: Sampler,
    configs: Mapping[str, SurgeryConfig],
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    routers: Mapping[int, PageRouter] | None,
    batch_size: int,
) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "routers": _router_digest(routers or {}),
        "tasks": list(tasks),
        "lengths": list(lengths),
        "samples": samples,
        "seed": sampler.seed,
        "chat": sampler.chat,
        "haystack": text_digest(*sampler.materials.sentences),
        "questions": {
            task: text_digest(*s.documents, *(q.text for q in s.questions))
            for task, s in sampler.materials.questions.items()
            if task in tasks
        },
        "batch_size": batch_size,
        "versions": versions(model),
    }


def text_digest(*parts: str) -> str:
    """Short fingerprint of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _router_digest(routers: Mapping[int, PageRouter]) -> str:
    """Fingerprint of learned corrections, whatever device they are on."""
    parts = [
        f"{index} {name} {hashlib.sha256(part.detach().float().cpu().numpy().tobytes()).hexdigest()}"
        for index, router in sorted(routers.items())
        for name, part in router.tensors().items()
    ]
    return text_digest(*parts) if parts else ""
