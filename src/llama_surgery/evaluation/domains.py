"""Perplexity, divergence and density in several domains, in one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import TextError
from llama_surgery.evaluation.evaluate import evaluate, named_progress
from llama_surgery.evaluation.io import Progress
from llama_surgery.evaluation.result import EvaluationResult
from llama_surgery.text import read_texts
from llama_surgery.topology.router import PageRouter


def evaluate_domains(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    domains: Mapping[str, Sequence[str]],
    length: int,
    windows: int | None,
    configs: Mapping[str, SurgeryConfig],
    routers: Mapping[int, PageRouter] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, EvaluationResult]:
    """Measures the dense model and each configuration on the texts of each domain, without needles.

    Thresholds stay as they are: what is seen is how one calibration serves several kinds of text.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It comes back dense.
        tokenizer: Its tokenizer.
        domains: Documents by name of the domain.
        length: Tokens of a window.
        windows: Windows in each domain; 16, or as many as its texts hold, if None.
        configs: What to measure, by name, thresholds set.
        routers: Learned corrections by layer index, or None.
        seed: Of windows and bootstraps.
        progress: Told as ``progress(stage, done, total)``.

    Raises:
        SurgeryError, UnsupportedModelError, TextError: As
            :func:`~llama_surgery.evaluation.evaluate.evaluate` does; a TextError names the domain.
    """
    results = {}
    for name, texts in domains.items():
        try:
            results[name] = evaluate(
                model,
                tokenizer,
                eval_texts=texts,
                length=length,
                windows=windows,
                needles=0,
                configs=configs,
                routers=routers,
                seed=seed,
                progress=named_progress(progress, name),
            )
        except TextError as error:
            raise TextError(f"domain {name!r}: {error}") from error
    return results


def read_domains(given: Sequence[str]) -> dict[str, list[str]]:
    """Documents by domain, from ``name=path`` or a path alone, named after its last part.

    Raises:
        TextError: A path cannot be read, or two domains have one name.
    """
    domains: dict[str, list[str]] = {}
    for item in given:
        name, separator, path = item.partition("=")
        if not separator or Path(item).exists():
            name, path = Path(item).resolve().stem, item
        if name in domains:
            raise TextError(f"two domains are named {name!r}: give them as name=path, under different names.")
        domains[name] = read_texts(path)
    return domains
