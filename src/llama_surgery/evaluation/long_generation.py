"""Long texts that an operated model writes, beside those of the dense model."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import check_dense, named_progress
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.result import DENSE
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.progress import Progress
from llama_surgery.text import shared_start
from llama_surgery.text import windows as cut_windows
from llama_surgery.topology.router import PageRouter

#: Runs of this many tokens are counted by :func:`repetition`.
RUN = 4


class Written(NamedTuple):
    """A text that a model wrote greedily, or read along.

    Attributes:
        tokens: The new tokens, up to the end-of-text token, which is included.
        likeliest: For each, the token that the model would have written.
        margins: The logarithm of that one's probability over that of the second likeliest, nats.
    """

    tokens: list[int]
    likeliest: list[int]
    margins: list[float]


class _Watch(LogitsProcessor):
    """Remembers the likeliest token of every step and how far it was ahead; writes given tokens instead."""

    def __init__(self, forced: Sequence[int] | None) -> None:
        self.forced = forced
        self.likeliest: list[torch.Tensor] = []
        self.margins: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores[0].topk(2)
        self.likeliest.append(best.indices[0])
        self.margins.append(best.values[0] - best.values[1])
        if self.forced is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.forced[len(self.margins) - 1]] = 0.0
        return forced


def write_on(
    model: nn.Module,
    windows: torch.Tensor,
    new_tokens: int,
    progress: Progress | None = None,
    *,
    along: Sequence[Sequence[int]] | None = None,
) -> list[Written]:
    """What a model writes after each of (windows, length) int64, greedily, or would have along given texts.

    These are fed to ``generate()`` token by token, so that each step is a real decode step, and a token that
    differs does not carry the rest away with it. ``progress`` is told after each window.
    """
    texts = []
    for number, window in enumerate(windows.tolist()):
        forced = None if along is None else along[number]
        watch = _Watch(forced)
        count = new_tokens if forced is None else len(forced)
        (tokens,) = continue_greedily(model, [window], count, processors=[watch])
        likeliest, margins = (torch.stack(part).tolist() for part in (watch.likeliest, watch.margins))
        texts.append(Written(tokens, likeliest, margins))
        if progress is not None:
            progress("generation" if along is None else "agreement", number + 1, len(windows))
    return texts


def repetition(tokens: Sequence[int]) -> float:
    """Share of runs of ``RUN`` tokens that have occurred before in the text; 0 for shorter texts.

    The measure "seq-rep-n" of Welleck et al. (2020), "Neural Text Generation with Unlikelihood
    Training", arXiv:1908.04319.
    """
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Tokens that two texts have in common from the start; None if they are the same."""
    shared = shared_start(one, other)
    return None if shared == max(len(one), len(other)) else shared


def check_tokens(new_tokens: int, length: int) -> None:
    """Raises SurgeryError where no prompt is left of ``length`` tokens."""
    if not 1 <= new_tokens <= length - 2:
        raise SurgeryError(
            f"{new_tokens} new tokens of {length} in all: at least 1 is written, after a prompt of 2 or more."
        )


def long_generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str],
    length: int,
    new_tokens: int,
    count: int,
    configs: Mapping[str, SurgeryConfig],
    routers: Mapping[str, Mapping[int, PageRouter] | None] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Lets the dense model and each configuration write on after the same prompts.

    Arguments that are not named here are those of :func:`~llama_surgery.evaluation.evaluate.evaluate`.

    Args:
        texts: Documents that prompts are cut from.
        length: Tokens of a prompt and its continuation together.
        new_tokens: Most tokens to write.
        count: Prompts.

    Returns:
        For each configuration: ``prompt_tokens``, ``new_tokens`` (at most), ``compared`` (tokens of the dense
        texts), ``agreement`` and ``agreement_by_text`` (share of them that the operated model, reading along,
        would have written), ``first_difference`` (for each text, tokens before the two free texts differ;
        None where they never do), ``margin_there`` (how far the dense model's likeliest token was ahead
        where they first differ, nats; None where one text ended there), ``margin`` (its median over all
        tokens), and means of ``length_…`` and ``repetition_…`` for ``dense`` and ``operated``.

    Raises:
        SurgeryError: The model is operated or in training mode, or no prompt is left of ``length``.
        TextError: The texts are too short.
    """
    check_dense(model, configs)
    check_tokens(new_tokens, length)
    prompts = cut_windows(tokenizer, texts, length - new_tokens, count, seed)
    dense = write_on(model, prompts, new_tokens, named_progress(progress, DENSE))
    results = {}
    for name, config in configs.items():
        tell = named_progress(progress, name)
        with operated(model, config, routers=(routers or {}).get(name)):
            own = write_on(model, prompts, new_tokens, tell)
            along = write_on(model, prompts, new_tokens, tell, along=[text.tokens for text in dense])
        sizes = {"prompt_tokens": prompts.shape[1], "new_tokens": new_tokens}
        results[name] = sizes | _summary(dense, own, along)
    return results


def _summary(
    dense: Sequence[Written], operated: Sequence[Written], along: Sequence[Written]
) -> dict[str, Any]:
    agree = [
        [a == b for a, b in zip(text.likeliest, own.tokens, strict=True)]
        for text, own in zip(along, dense, strict=True)
    ]
    first = [first_difference(a.tokens, b.tokens) for a, b in zip(dense, operated, strict=True)]
    found: dict[str, Any] = {
        "compared": sum(map(len, agree)),
        "agreement": statistics.fmean(same for text in agree for same in text),
        "agreement_by_text": [statistics.fmean(text) for text in agree],
        "first_difference": first,
        "margin_there": [
            None if place is None or place >= len(text.margins) else text.margins[place]
            for place, text in zip(first, dense, strict=True)
        ],
        "margin": statistics.median(margin for text in dense for margin in text.margins),
    }
    for name, texts in (("dense", dense), ("operated", operated)):
        found[f"length_{name}"] = statistics.fmean(len(text.tokens) for text in texts)
        found[f"repetition_{name}"] = statistics.fmean(repetition(text.tokens) for text in texts)
    return found
