"""Long texts that an operated model writes, beside those of the dense model."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

import llama_surgery
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import check_dense, named_progress
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.io import Progress
from llama_surgery.evaluation.result import DENSE
from llama_surgery.text import windows as cut_windows
from llama_surgery.topology.router import PageRouter

#: Runs of this many tokens are counted by :func:`repetition`.
RUN = 4


class Written(NamedTuple):
    """A text that a model wrote greedily.

    Attributes:
        tokens: The new tokens, up to the end-of-text token, which is included.
        margins: For each, the logarithm of its probability over that of the second likeliest, nats.
    """

    tokens: list[int]
    margins: list[float]


class _Margins(LogitsProcessor):
    """Changes nothing, and remembers by how much the likeliest token was ahead."""

    def __init__(self) -> None:
        self.margins: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, second = scores[0].topk(2).values
        self.margins.append(first - second)
        return scores


def write_on(
    model: nn.Module, windows: torch.Tensor, new_tokens: int, progress: Progress | None = None
) -> list[Written]:
    """What a model writes after each window, greedily.

    Args:
        model: A causal language model of transformers, dense or operated.
        windows: (windows, length), int64.
        new_tokens: Most tokens to write.
        progress: Told after each window.
    """
    texts = []
    for done, window in enumerate(windows.tolist(), start=1):
        watch = _Margins()
        (tokens,) = continue_greedily(model, [window], new_tokens, processors=[watch])
        texts.append(Written(tokens, torch.stack(watch.margins).tolist()))
        if progress is not None:
            progress("generation", done, len(windows))
    return texts


class _Forced(LogitsProcessor):
    """Puts given tokens in the place of the likeliest, and remembers where the two were the same."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.agree: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[len(self.agree)]
        self.agree.append(scores[0].argmax() == token)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


def agreement(
    model: nn.Module, windows: torch.Tensor, texts: Sequence[Sequence[int]], progress: Progress | None = None
) -> list[list[bool]]:
    """Where a model, reading along a text, would have written the same token.

    The text is fed to ``generate()`` token by token, so each step is a real decode step, and a token that
    differs does not carry the rest away with it.

    Args:
        model: The operated model.
        windows: (windows, length), int64.
        texts: The dense model's greedy continuations of the windows.
        progress: Told after each window.

    Returns:
        For each window, for each token of its text, whether the model's likeliest token is the same.
    """
    agree = []
    for done, (window, text) in enumerate(zip(windows.tolist(), texts, strict=True), start=1):
        forced = _Forced(text)
        continue_greedily(model, [window], len(text), processors=[forced])
        agree.append(torch.stack(forced.agree).tolist())
        if progress is not None:
            progress("agreement", done, len(texts))
    return agree


def repetition(tokens: Sequence[int], run: int = RUN) -> float:
    """Share of runs of ``run`` tokens that have occurred before in the text; 0 for shorter texts.

    The measure "seq-rep-n" of Welleck et al. (2020), "Neural Text Generation with Unlikelihood
    Training", arXiv:1908.04319.
    """
    runs = [tuple(tokens[start : start + run]) for start in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Tokens that two texts have in common from the start; None if they are the same."""
    shared = next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return None if shared == max(len(one), len(other)) else shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongGeneration:
    """Texts of an operated model beside those of the dense one, after the same prompts.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Most tokens that were to be written.
        compared: Tokens of the dense texts, on which agreement was measured.
        agreement: Share of them that the operated model, reading along, would have written too.
        agreement_by_text: The same for each text.
        first_difference: For each text, tokens before the two free texts differ; None where they never do.
        margin_there: For each text, how far the dense model's likeliest token was ahead of its second where
            the texts first differ, nats; None where they never do, or one ended there.
        margin: Median of the same over all tokens of the dense texts.
        length_dense, length_operated: Mean tokens written.
        repetition_dense, repetition_operated: Mean of :func:`repetition`.
    """

    prompt_tokens: int
    new_tokens: int
    compared: int
    agreement: float
    agreement_by_text: list[float]
    first_difference: list[int | None]
    margin_there: list[float | None]
    margin: float
    length_dense: float
    length_operated: float
    repetition_dense: float
    repetition_operated: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def long_generation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str],
    length: int,
    new_tokens: int,
    count: int,
    configs: Mapping[str, SurgeryConfig],
    routers: Mapping[int, PageRouter] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LongGeneration]:
    """Lets the dense model and each configuration write on after the same prompts.

    Args:
        model: A dense causal language model of transformers, in evaluation mode. It comes back dense.
        tokenizer: Its tokenizer.
        texts: Documents that prompts are cut from.
        length: Tokens of a prompt and its continuation together.
        new_tokens: Most tokens to write.
        count: Prompts.
        configs: What to measure, by name, thresholds set.
        routers: Learned corrections by layer index, used with every configuration, or None.
        seed: Of the prompts.
        progress: Told as ``progress(stage, done, total)``.

    Raises:
        SurgeryError: The model is operated or in training mode, or no prompt is left of ``length``.
        TextError: The texts are too short.
    """
    check_dense(model, configs)
    if not 1 <= new_tokens <= length - 2:
        raise SurgeryError(
            f"{new_tokens} new tokens of {length} in all: at least 1 is written, after a prompt of 2 or more."
        )
    prompts = cut_windows(tokenizer, texts, length - new_tokens, count, seed)
    dense = write_on(model, prompts, new_tokens, named_progress(progress, DENSE))
    results = {}
    for name, config in configs.items():
        tell = named_progress(progress, name)
        with llama_surgery.operated(model, config, routers=routers):
            operated = write_on(model, prompts, new_tokens, tell)
            agree = agreement(model, prompts, [text.tokens for text in dense], tell)
        results[name] = _summary(prompts.shape[1], new_tokens, dense, operated, agree)
    return results


def _summary(
    prompt_tokens: int,
    new_tokens: int,
    dense: Sequence[Written],
    operated: Sequence[Written],
    agree: Sequence[Sequence[bool]],
) -> LongGeneration:
    flat = [same for text in agree for same in text]
    first = [first_difference(a.tokens, b.tokens) for a, b in zip(dense, operated, strict=True)]
    return LongGeneration(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        compared=len(flat),
        agreement=statistics.fmean(flat),
        agreement_by_text=[statistics.fmean(text) for text in agree],
        first_difference=first,
        margin_there=[
            None if place is None or place >= len(text.margins) else text.margins[place]
            for place, text in zip(first, dense, strict=True)
        ],
        margin=statistics.median(margin for text in dense for margin in text.margins),
        length_dense=statistics.fmean(len(text.tokens) for text in dense),
        length_operated=statistics.fmean(len(text.tokens) for text in operated),
        repetition_dense=statistics.fmean(repetition(text.tokens) for text in dense),
        repetition_operated=statistics.fmean(repetition(text.tokens) for text in operated),
    )
