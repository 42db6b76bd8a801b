"""The dense model against its operated forms, on the same windows and prompts, in one run."""

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery import __version__
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.generation import phases
from llama_surgery.evaluation.intervals import paired_difference, perplexity_ratio
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.needle import needle_prompts, score_needles
from llama_surgery.evaluation.needle_facts import PLAIN
from llama_surgery.evaluation.perplexity import Divergence, Perplexity, perplexity, token_divergence
from llama_surgery.evaluation.result import DENSE, EvaluationResult, Measurement, OperatedMeasurement
from llama_surgery.surgery import operation
from llama_surgery.surgery.adapter import weights_digest
from llama_surgery.surgery.context import check_length, check_vocabulary
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.progress import Progress
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows as cut_windows
from llama_surgery.topology.router import PageRouter

#: Perplexity windows, unless others are asked for.
WINDOWS = 16


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eval_texts: Sequence[str],
    length: int,
    windows: int | None,
    needles: int,
    configs: Mapping[str, SurgeryConfig],
    routers: Mapping[str, Mapping[int, PageRouter] | None] | None = None,
    seed: int = 0,
    needle_lengths: Sequence[int] | None = None,
    needle_variants: Sequence[str] = (PLAIN,),
    needle_batch: int = 1,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measures the dense model once, then each configuration against it.

    The dense model's final hidden states are kept in main memory, in the model's own precision, for the
    divergence: windows × length × hidden size. Needles are answered by greedy ``generate()``.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It comes back dense.
        eval_texts: Documents that nothing was tuned on.
        length: Tokens of a perplexity window.
        windows: Perplexity windows; 16, or as many as the texts hold, if None.
        needles: Needle prompts; 0 for none.
        configs: What to measure, by name, thresholds set.
        routers: Learned corrections by layer index, by the configuration's name, where it has any.
        seed: Of windows and prompts.
        needle_lengths: Context lengths of the prompts; ``(length,)`` if None.
        needle_variants: Keys of :data:`~llama_surgery.evaluation.needle_facts.VARIANTS`.
        needle_batch: Prompts of equal length that are answered together.
        progress: Told as ``progress(stage, done, total)``.

    Raises:
        SurgeryError: The model is operated already or in training mode, a configuration does not fit it,
            or a loss is not finite.
        UnsupportedModelError: The model cannot be operated or measured, with the reason.
        TextError: The texts are too short.
    """
    check_dense(model, configs)
    lengths = (length,) if needle_lengths is None else needle_lengths
    check_length(model, max(length, *lengths) if needles else length)
    ids = cut_windows(tokenizer, eval_texts, length, windows, seed, usual=WINDOWS)
    check_vocabulary(model, ids)
    prompts = []
    if needles:
        prompts = needle_prompts(
            tokenizer, eval_texts, count=needles, lengths=lengths, variants=needle_variants, seed=seed
        )
    head = Head(model, ids[0])
    dense_states: list[torch.Tensor] = []
    tell = named_progress(progress, DENSE)
    losses = perplexity(model, ids, tell, head=head, each=lambda states: dense_states.append(states.cpu()))
    answers, seconds = _answer(model, prompts, needle_batch, tell)
    result = EvaluationResult(
        model=model_name(model),
        length=length,
        windows=len(ids),
        seed=seed,
        environment=environment(model),
        dense=Measurement(**_measured(DENSE, losses, answers, seconds)),
        operated=[],
        needles=prompts,
        answers={DENSE: answers},
    )
    for name, config in configs.items():
        tell = named_progress(progress, name)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def compare(states: torch.Tensor, found: list[tuple[torch.Tensor, torch.Tensor]] = found) -> None:
            found.append(token_divergence(head, dense_states[len(found)], states))

        with operated(model, config, routers=(routers or {}).get(name)):
            operation.reset_statistics(model)
            own = perplexity(model, ids, tell, head=head, each=compare)
            density = operation.statistics(model).to_dict()
            with phases(model) as generate_density:
                answers, seconds = _answer(model, prompts, needle_batch, tell)
            described = operation.config_of(model).to_dict()
        divergence = Divergence(*map(torch.stack, zip(*found, strict=True)))
        result.answers[name] = answers
        result.operated.append(
            OperatedMeasurement(
                **_measured(name, own, answers, seconds),
                config=described,
                ratio=perplexity_ratio(losses.per_window, own.per_window),
                divergence_by_position=divergence.by_position(),
                kl=divergence.mean_kl,
                top1=divergence.top1,
                density=density,
                needle=paired_difference(result.answers[DENSE], answers) if prompts else None,
                generate_density=generate_density,
            )
        )
    return result


def check_dense(model: nn.Module, configs: Mapping[str, SurgeryConfig]) -> None:
    """Refuses what cannot be measured against the dense model.

    Raises:
        SurgeryError: The model is operated or in training mode, or a configuration is named as the dense one.
    """
    if operation.is_operated(model):
        raise SurgeryError("the model is operated: eject(model) first, so that the dense model is measured.")
    if model.training:
        raise SurgeryError(
            "the model is in training mode, where dropout adds noise: call model.eval() first."
        )
    if DENSE in configs:
        raise SurgeryError(f"a configuration is named {DENSE!r}, as the dense model is: choose another name.")


def named_progress(progress: Progress | None, name: str) -> Progress | None:
    """``progress`` with a name before each stage."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _answer(
    model: nn.Module, prompts: Sequence[Any], batch: int, progress: Progress | None
) -> tuple[list[bool], float]:
    start = time.perf_counter()
    return score_needles(model, prompts, batch, progress), time.perf_counter() - start


def _measured(name: str, losses: Perplexity, answers: list[bool], seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "perplexity": losses.value,
        "by_position": losses.by_position(),
        "seconds_per_window": statistics.median(losses.seconds),
        "needle_accuracy": sum(answers) / len(answers) if answers else None,
        "needle_seconds": seconds if answers else None,
    }


def model_name(model: nn.Module) -> str:
    """Name of a model on a hub, or of what it was loaded from; its class if it has neither."""
    inner = inner_model(model)
    name = getattr(inner.config, "_name_or_path", "")
    if name and Path(name).exists():
        return Path(name).resolve().name
    return name or type(inner).__name__


def versions(model: nn.Module) -> dict[str, Any]:
    """Versions, weights, device and precision: what a run that goes on with an earlier one shares with it."""
    device = inner_model(model).device
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = platform.processor() or platform.machine()
    return {
        "llama_surgery": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(inner_model(model).dtype).removeprefix("torch."),
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "device": f"{device.type}: {device_name}",
        "weights": weights_digest(model),
    }


def environment(model: nn.Module) -> dict[str, Any]:
    """Versions, weights, device, precision and threads that a measurement was made with."""
    return {
        **versions(model),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
