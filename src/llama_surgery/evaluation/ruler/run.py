"""Answering samples, and whole runs that can be interrupted."""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import check_dense, model_name, versions
from llama_surgery.evaluation.generation import continue_greedily, end_tokens
from llama_surgery.evaluation.kept import Kept, adapter_digest, digest
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.generators import questions_for
from llama_surgery.evaluation.ruler.result import RulerResult
from llama_surgery.evaluation.ruler.tasks import READING, RulerSample, Sampler, task_of
from llama_surgery.surgery import operation
from llama_surgery.surgery.context import context_length
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.progress import Progress
from llama_surgery.topology.router import PageRouter

#: Samples of a cell that are answered, and kept, before the next cell has its turn.
TURN = 5


def answer_samples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[RulerSample], batch_size: int = 1
) -> list[str]:
    """What a model, dense or operated, writes for each sample by greedy ``generate()``.

    An answer that has all its references ends there: what would follow could not change its score.
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
    routers: Mapping[str, Mapping[int, PageRouter] | None] | None = None,
    batch_size: int = 1,
    kept: Kept | None = None,
    deadline: float | None = None,
    progress: Progress | None = None,
) -> RulerResult:
    """Answers the same samples with the dense model and with each configuration.

    Cells take turns, so that a run which is cut short has answered all tasks and lengths alike.

    Arguments that are not named here are those of :func:`~llama_surgery.evaluation.evaluate.evaluate`.

    Args:
        sampler: Makes the samples.
        tasks: Names of tasks.
        lengths: Tokens of prompt and answer together.
        samples: Samples of each task at each length.
        batch_size: Samples that are answered together.
        kept: Where answers are kept, turn by turn; nowhere if None.
        deadline: ``time.monotonic()`` after which no further turn is begun.

    Raises:
        SurgeryError: The model is operated, in training mode or not made for such lengths.
        TextError: A task does not exist, or its samples cannot be made.
    """
    check_dense(model, configs)
    tasks, lengths = list(dict.fromkeys(tasks)), sorted(set(lengths))
    check_samples(model, sampler, tasks, lengths, samples, batch_size)
    kept = Kept() if kept is None else kept
    corrections = routers or {}
    forms = {name: (c, adapter_digest(c, corrections.get(name))) for name, c in configs.items()}
    made = {"model": model_name(model), "versions": versions(model), "seed": sampler.seed}
    made |= {"chat": sampler.chat, "haystack": digest(*sampler.materials.sentences), "batch_size": batch_size}
    described = {name: config.to_dict() for name, config in configs.items()}
    asked = {"tasks": tasks, "lengths": lengths, "samples": samples}
    result = RulerResult({**made, "configs": described, **asked})
    turn = max(TURN, batch_size)
    for start in range(0, samples, turn):
        indices = range(start, min(start + turn, samples))
        for length, task in itertools.product(lengths, tasks):
            late = deadline is not None and time.monotonic() > deadline
            decides = {**made, "task": task, "length": length, "samples": [start, indices.stop]}
            if task in READING:
                questions = sampler.materials.questions[task]
                decides["questions"] = digest(*questions.documents, *(q.text for q in questions.questions))
            for name, (config, topology) in {DENSE: (None, None), **forms}.items():
                how = (batch_size, config, corrections.get(name))
                make = functools.partial(_answered, model, sampler, (task, length, indices), *how)
                found = kept.once("ruler", None if late else make, **decides, topology=topology)
                cell = result.cell(name, task, length)
                if found is not None and len(cell.scores) == start:  # none behind a gap: pairs go by position
                    cell.add(found)
                if progress is not None:
                    done = sum(len(cell.scores) for cell in result.cells if cell.name == name)
                    progress(f"{name}: RULER", done, samples * len(tasks) * len(lengths))
    return result


def check_samples(
    model: nn.Module,
    sampler: Sampler,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    batch_size: int = 1,
) -> None:
    """Refuses what cannot be made or answered, before anything is answered. Arguments are those of a run.

    Raises:
        SurgeryError: There is nothing to answer, or the model was not made for such lengths.
        TextError: A task does not exist, or its samples cannot be made.
    """
    if min(samples, batch_size) < 1 or not tasks or not lengths:
        raise SurgeryError(
            f"{samples} samples of tasks {list(tasks)} at lengths {list(lengths)}, in batches of "
            f"{batch_size}: at least one of each is needed."
        )
    context, longest = context_length(model), max(lengths)
    if context is not None and longest > context:
        raise SurgeryError(
            f"{longest} tokens: {model_name(model)} was made for {context}. Leave longer lengths out."
        )
    for task in tasks:
        task_of(task)
        if task in READING:
            questions_for(task, sampler.materials, samples)
    for length, task in itertools.product(lengths, tasks):
        sampler.samples(task, length, [0])


def _answered(
    model: nn.Module,
    sampler: Sampler,
    asked: tuple[str, int, Sequence[int]],
    batch_size: int,
    config: SurgeryConfig | None,
    routers: Mapping[int, PageRouter] | None,
) -> dict[str, Any]:
    """Fields of a cell, of the dense model if there is no configuration."""
    samples, pairs = sampler.samples(*asked), {}
    with nullcontext() if config is None else operated(model, config, routers=routers):
        began = time.perf_counter()
        answers = answer_samples(model, sampler.tokenizer, samples, batch_size)
        seconds = time.perf_counter() - began
        if config is not None:
            read = operation.statistics(model)
            pairs = {"read": read.total_density * read.causal_pairs, "causal": read.causal_pairs}
    scores = [sample.score(answer) for sample, answer in zip(samples, answers, strict=True)]
    return {"scores": scores, "answers": answers, "seconds": seconds, "pairs": pairs}
