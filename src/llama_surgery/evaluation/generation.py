"""Greedy generation through a model's own ``generate()``."""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from llama_surgery.surgery import operation
from llama_surgery.surgery.compat import CACHE_NAME, cache_name
from llama_surgery.surgery.supported import inner_model


def greedy_config(model: nn.Module, tokens: int) -> GenerationConfig:
    """Pins what a model's own generation settings could change (some penalise repetition)."""
    pad = inner_model(model).generation_config.pad_token_id
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        # A value keeps transformers from asking; what it stands for is masked or cut off.
        pad_token_id=0 if pad is None else pad,
    )


class _Until(StoppingCriteria):
    """Ends a row as soon as ``enough`` says so, and remembers where."""

    def __init__(self, prompt: int, enough: Callable[[int, list[int]], bool]) -> None:
        self.prompt, self.enough = prompt, enough
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for index, row in enumerate(input_ids[:, self.prompt :].tolist()):
            if index not in self.ends and self.enough(index, row):
                self.ends[index] = len(row)
        done = [index in self.ends for index in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    enough: Callable[[int, list[int]], bool] | None = None,
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """The likeliest continuation of each prompt, through the model's own ``generate()``.

    Args:
        model: A causal language model of transformers, dense or operated.
        prompts: Token ids; computed as one batch, padded on the left where they differ in length.
        new_tokens: Most tokens to write; the end-of-text token ends a row, and is included.
        enough: Asked after each token, with the row and what it has written: whether to end there.
        processors: Given the scores of every step.
    """
    width = max(map(len, prompts))
    config = greedy_config(model, new_tokens)
    padded = [[config.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = inner_model(model).device
    until = None if enough is None else _Until(width, enough)
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=config,
        stopping_criteria=[] if until is None else [until],
        logits_processor=list(processors),
    )
    ends = end_tokens(model)
    rows = []
    for index, row in enumerate(output[:, width:].tolist()):
        stop = next((number for number, token in enumerate(row, start=1) if token in ends), len(row))
        rows.append(row[: min(stop, len(row) if until is None else until.ends.get(index, len(row)))])
    return rows


def timed_call(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[Any, float]:
    """The cache behind tokens (1, length), and the seconds that reading them took, awaited on a GPU too."""
    given = {} if cache is None else {cache_name(model): cache}
    began = time.perf_counter()
    called = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    called.logits.sum().item()
    return called[CACHE_NAME], time.perf_counter() - began


def end_tokens(model: nn.Module) -> set[int]:
    """Tokens that end a text in ``generate()``."""
    ends = inner_model(model).generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


_DENSITIES = ("far_density", "near_density", "summary_density", "total_density", "visible_far_density")


@contextlib.contextmanager
def phases(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Read the statistics of an operated model, which are reset, within a ``with`` block.

    A call of more than one token is a prefill, all others are decode steps. Statistics are read before and
    after a prefill and at the end alone: every read waits for the device.

    Yields:
        Densities of each phase that occurs, over its causal pairs: ``prefill`` and ``decode``; at the end.
    """
    operation.reset_statistics(model)
    found: dict[str, dict[str, float]] = {}
    pairs: dict[str, Counter[str]] = defaultdict(Counter)

    def add(phase: str) -> None:
        """What was read since the last time."""
        read = operation.statistics(model)
        counts = {name: getattr(read, name) * read.causal_pairs for name in _DENSITIES}
        new = Counter({**counts, "causal": read.causal_pairs})
        for earlier in pairs.values():
            new.subtract(earlier)
        pairs[phase].update(new)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _tokens(args, kwargs) > 1:
            add("decode")

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _tokens(args, kwargs) > 1:
            add("prefill")

    decoder = inner_model(model).get_decoder()
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    add("decode")
    for phase, read in pairs.items():
        if read["causal"]:
            found[phase] = {name: read[name] / read["causal"] for name in _DENSITIES}


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a call of a decoder is given, of each sequence."""
    given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next((states.shape[1] for states in given if states is not None), 0)
