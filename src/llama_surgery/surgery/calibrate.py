"""Thresholds for a density: one θ for tiles, one for decode steps, found on a little text."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.context import check_far_field, check_length, check_vocabulary, usual_length
from llama_surgery.surgery.operation import config_of, paged_cache, reset_statistics, set_config, statistics
from llama_surgery.surgery.search import Search
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows
from llama_surgery.topology.geometry import first_far

_log = logging.getLogger(__name__)
#: Windows of calibration text, spread over the documents.
WINDOWS = 4
#: How many it usually takes: for progress.
USUAL = 4
#: Decode steps come after a prompt: their rows are those of this last part of a window.
LAST_PART = 0.25
#: For −log θ, with which density rises. Shares are ratios of two estimates, of which the upper one may be far
#: too high: keys with large biases take θ beyond 1.
_SEARCH = Search(-12.0, 14.0, slope=0.6, stride=math.log(100), enough=0.95, aim=0.98, near=0.01, tries=10)


def calibrate(
    model: torch.nn.Module, ids: torch.Tensor, density: float, *, decode_density: float | None = None
) -> SurgeryConfig:
    """Set θ of an operated model for an executed far density; returns its new configuration.

    What is executed is counted, by whoever will execute it, with no row dense. In texts longer than the
    windows θ falls with the position (``theta_length``), so that about as much is read. Tiles and decode
    steps see different shares, so each has its own θ: that of decode steps is set on the last rows of the
    windows, read behind the others as steps are.

    Args:
        model: An operated model.
        ids: (windows, length) int64, those of :func:`calibration_windows`.
        density: Executed far pairs over causal pairs, at most.
        decode_density: The same for decode steps. Without, their θ stays as it is: by default they read
            everything.

    Raises:
        SurgeryError: ``density`` is out of reach. The model keeps its configuration.
    """
    given = config_of(model)
    config = dataclasses.replace(given, theta_length=ids.shape[1])
    ids = ids.to(inner_model(model).device)

    def prompts(theta: float) -> float:
        set_config(model, dataclasses.replace(with_theta(config, theta), dense_until=0))
        return _prompt_density(model, ids)

    def steps(theta: float) -> float:
        set_config(model, dataclasses.replace(config, theta_decode=theta, dense_until=0))
        return _step_density(model, ids)

    try:
        theta = threshold(prompts, density, given.theta)
        config = with_theta(config, theta)
        if given.tile != 1 and decode_density is not None:
            theta = threshold(steps, decode_density, given.theta_decode or theta)
            config = dataclasses.replace(config, theta_decode=theta)
        set_config(model, config)
    except BaseException:
        set_config(model, given)
        raise
    finally:
        reset_statistics(model)
    return config


def with_theta(config: SurgeryConfig, theta: float) -> SurgeryConfig:
    """A configuration with another θ of prompts, in tiles of one row of decode steps too."""
    both = {"theta_decode": theta} if config.tile == 1 else {}
    return dataclasses.replace(config, theta=theta, **both)


def threshold(measure: Callable[[float], float], density: float, start: float) -> float:
    """A θ at which nearly as much is read as a density allows, and no more.

    Args:
        measure: The density at a θ; falls as that rises.
        density: The most that may be read.
        start: Where to begin; 0 for the usual θ.

    Raises:
        SurgeryError: More is read at any θ.
    """
    tried = _SEARCH.run(lambda x: measure(math.exp(-x)), density, -math.log(start or SurgeryConfig().theta))
    within = [x for x, found in tried.items() if found <= density]
    if within:
        return math.exp(-max(within))
    raise SurgeryError(
        "the density is out of reach: the page that holds the first token is always open and takes "
        f"{min(tried.values()) / density:.1f} times the budget. Ask for more, or take smaller pages."
    )


@torch.inference_mode()
def _prompt_density(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Executed far density of windows that are read as prompts."""
    reset_statistics(model)
    for window in ids:
        _check(inner_model(model)(window[None], use_cache=False, logits_to_keep=1))
    return statistics(model).far_density


@torch.inference_mode()
def _step_density(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Executed far density of the windows' last rows, as decode steps behind the others."""
    inner, length, tile = inner_model(model), ids.shape[1], config_of(model).tile
    first, read, causal = max(tile, round(length * (1 - LAST_PART)) // tile * tile), 0.0, 0
    for window in ids:
        cache = paged_cache(model)
        with cache.prompt(first):
            options = {cache_name(inner): cache, "use_cache": True, "logits_to_keep": 1}
            inner(window[None, :first], **options)
            reset_statistics(model)
            _check(inner(window[None, first:], **options))
        found = statistics(model)
        read, causal = read + found.far_density * found.causal_pairs, causal + found.causal_pairs
    return read / causal


def _check(output: Any) -> None:
    """Raise SurgeryError where a model's output, logits or hidden states, is not a number."""
    if bool(output[0].isnan().any()):
        raise SurgeryError(
            "the model gives NaN: no page can be weighed. Check the weights, and that the dtype has the "
            "range the model needs."
        )


def check_densities(config: SurgeryConfig, density: float, decode_density: float | None) -> None:
    """Raise SurgeryError where a density is out of range, or there is one too many."""
    for name, value in (("density", density), ("decode_density", decode_density)):
        if value is not None and (isinstance(value, str) or not 0 < value < 1):
            raise SurgeryError(f"{name}={value!r}: must lie between 0 and 1; 0.06 is six per cent.")
    if config.tile == 1 and decode_density not in (None, density):
        raise SurgeryError(
            f"decode_density={decode_density} with tile=1: one threshold serves prompts and decode steps. "
            "Leave it out."
        )


def calibration_windows(
    model: torch.nn.Module,
    tokenizer: Any,
    text: list[str],
    length: int | None,
    config: SurgeryConfig,
    count: int = WINDOWS,
) -> torch.Tensor:
    """Windows of text that thresholds of ``config`` are set on: (at most ``count``, length) int64.

    Args:
        model: Dense or operated.
        text: Documents.
        length: Tokens of a window; the model's context, at most 8,192 and what the text holds, if None.
        count: Windows wanted; fewer where the text holds fewer, with a warning.

    Raises:
        SurgeryError: The topology has no threshold, or there is no tokenizer.
        TextError: The text or the length is too short.
    """
    if config.topology != "pages":
        raise SurgeryError(
            f"topology={config.topology!r} has no threshold that a density or a loss could set: leave them "
            "out."
        )
    if tokenizer is None:
        raise SurgeryError("tokenizer=None: calibration text needs the model's tokenizer.")
    usual = length is None
    length = usual_length(model) if length is None else length
    if isinstance(length, str | float):
        raise SurgeryError(f"length={length!r}: must be a whole number of tokens, such as 8192.")
    check_length(model, length)
    check_far_field(length, config)
    shorter = [length >> halved for halved in range(1, length.bit_length())] if usual else []
    lengths = [n for n in (length, *shorter) if n > first_far(config)]
    errors = []
    for length in lengths:
        try:
            found = windows(tokenizer, text, length, None, seed=0, usual=count)
        except TextError as error:
            errors.append(error)
            continue
        check_vocabulary(model, found)
        if errors:
            _log.warning(
                f"no document holds {lengths[0]:,} tokens: thresholds are set on windows of {length:,}. Give "
                "longer text, or the length that you mean."
            )
        return found
    raise errors[0]
