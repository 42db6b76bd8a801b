"""Answering samples, and whole runs that can be interrupted."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

import llama_surgery
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import environment, model_name
from llama_surgery.evaluation.generation import continue_greedily, end_tokens
from llama_surgery.evaluation.io import Progress
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import Cell, RulerResult
from llama_surgery.evaluation.ruler.samples import RulerSample, Sampler
from llama_surgery.evaluation.ruler.tasks import task_of
from llama_surgery.topology.router import PageRouter

#: Samples of a cell that are answered before the next cell has its turn, and before results are saved.
BLOCK = 25


def answer_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[RulerSample],
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[str]:
    """Lets a model answer by greedy ``generate()``.

    An answer that has all its references ends there: what would follow could not change its score.

    Args:
        model: A causal language model of transformers, dense or operated.
        tokenizer: Its tokenizer.
        samples: What to answer.
        batch_size: Samples that are answered together.
        progress: Told after each batch.

    Returns:
        For each sample, what was written.
    """
    answers: list[str] = []
    ends = end_tokens(model)

    def text(row: Sequence[int]) -> str:
        return tokenizer.decode([token for token in row if token not in ends])

    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        rows = continue_greedily(
            model,
            [sample.input_ids(tokenizer) for sample in batch],
            max(sample.new_tokens for sample in batch),
            enough=lambda index, row, batch=batch: batch[index].score(text(row)) == 1,
        )
        answers += [text(row[: sample.new_tokens]) for sample, row in zip(batch, rows, strict=True)]
        if progress is not None:
            progress("answers", len(answers), len(samples))
    return answers


def score_ruler(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[RulerSample],
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[float]:
    """Scores, 0…1, of what a model answers; arguments as of :func:`answer_samples`."""
    answers = answer_samples(model, tokenizer, samples, batch_size, progress)
    return [sample.score(answer) for sample, answer in zip(samples, answers, strict=True)]


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
    deadline: float | None = None,
    progress: Progress | None = None,
) -> RulerResult:
    """Answers the same samples with the dense model and with each configuration.

    Cells take turns, :data:`BLOCK` samples each, and all that is finished is saved after each turn. The
    same call goes on where an interrupted one stopped.

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
        deadline: ``time.monotonic()`` after which no further turn is begun.
        progress: Told as ``progress(stage, samples done, samples in all)``.

    Raises:
        SurgeryError: The model is operated or in training mode, or ``file`` holds another run.
        TextError: A task does not exist, or its samples cannot be made.
    """
    if llama_surgery.is_operated(model) or model.training:
        raise SurgeryError("the model must be dense and in evaluation mode: eject(model), model.eval().")
    if DENSE in configs:
        raise SurgeryError(f"a configuration is named {DENSE!r}, as the dense model is: choose another name.")
    if samples < 1 or not tasks or not lengths:
        raise SurgeryError(
            f"{samples} samples of tasks {list(tasks)} at lengths {list(lengths)}: at least one of each is "
            "needed."
        )
    for task in tasks:
        task_of(task)
    lengths = sorted(set(lengths))
    settings = _settings(model, sampler, configs, tasks, lengths, samples, routers, batch_size)
    result = RulerResult(settings) if file is None else RulerResult.load(file, settings)
    for task in tasks:
        for length in lengths:
            sampler.samples(task, length, [0])  # what cannot be made is said before anything is answered
    forms: dict[str, SurgeryConfig | None] = {DENSE: None, **configs}
    for start in range(0, samples, BLOCK):
        indices = range(start, min(start + BLOCK, samples))
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
                    _answer(
                        model,
                        sampler.tokenizer,
                        block[len(cell.scores) - start :],
                        cell,
                        config,
                        routers,
                        batch_size,
                    )
                    if file is not None:
                        result.write_json(file)
                    if progress is not None:
                        done = sum(len(cell.scores) for cell in result.cells if cell.name == name)
                        progress(f"{name}: RULER", done, samples * len(tasks) * len(lengths))
    return result


def _answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    block: Sequence[RulerSample],
    cell: Cell,
    config: SurgeryConfig | None,
    routers: Mapping[int, PageRouter] | None,
    batch_size: int,
) -> None:
    """Adds the answers to ``block`` to ``cell``."""
    start = time.perf_counter()
    with nullcontext() if config is None else llama_surgery.operated(model, config, routers=routers):
        answers = answer_samples(model, tokenizer, block, batch_size)
        if config is not None:
            read = llama_surgery.statistics(model)
            for name, pairs in (
                ("read", read.total_density * read.causal_pairs),
                ("causal", read.causal_pairs),
            ):
                cell.pairs[name] = cell.pairs.get(name, 0.0) + pairs
    cell.seconds += time.perf_counter() - start
    cell.answers += answers
    cell.scores += [sample.score(answer) for sample, answer in zip(block, answers, strict=True)]


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
        "routers": _digest(*(str((i, r.state_dict())) for i, r in sorted((routers or {}).items()))),
        "tasks": list(tasks),
        "lengths": list(lengths),
        "samples": samples,
        "seed": sampler.seed,
        "chat": sampler.chat,
        "haystack": _digest(*sampler.materials.sentences),
        "questions": {
            task: _digest(*(q.text for q in s.questions)) for task, s in sampler.materials.questions.items()
        },
        "batch_size": batch_size,
        "environment": environment(model),
    }


def _digest(*parts: str) -> str:
    """Short fingerprint of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
