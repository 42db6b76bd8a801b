"""Thresholds for a loss: the highest θ at which a model loses no more than that, found on a little text."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.evaluate import check_dense
from llama_surgery.evaluation.intervals import perplexity_ratio
from llama_surgery.evaluation.perplexity import Perplexity, perplexity
from llama_surgery.surgery.calibrate import calibration_windows, with_theta
from llama_surgery.surgery.head_budgets import budgets_where_none
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import MeasuredLoss, reset_statistics, routers_of, set_config, statistics
from llama_surgery.surgery.progress import Progress, counted
from llama_surgery.surgery.supported import inner_model

#: Windows of text, spread over the documents: more than for a density, since losses vary more than shares.
WINDOWS = 8
#: Tokens of a window that the interval counts as one sample. Windows are too few to be samples themselves;
#: losses of neighbouring tokens depend on each other, those of neighbouring blocks hardly do.
BLOCK = 512
#: How many θ are tried at most, and within what. In sharp heads more than the whole is expected of a page.
TRIES, LEAST, MOST = 10, 1e-6, 100.0
#: Total density from which on a model counts as not sparse: selection costs what little is saved.
DENSE = 0.75
#: Share of the limit that is enough, and the one that is aimed at.
ENOUGH, AIM = 0.85, 0.95
#: Two log θ that are as good as one.
_NEAR = 0.1
#: What log loss rises by with log θ, where one θ alone was tried (SmolLM2-135M: 1.4 at 4,096 tokens), and the
#: farthest that log θ then goes.
_SLOPE, _STRIDE = 1.4, math.log(10)


class Within(NamedTuple):
    """What :func:`config_within` returns: what to operate with, and what was measured with it."""

    config: SurgeryConfig
    routers: Mapping[int, Any]
    measured: MeasuredLoss


def config_within(
    model: torch.nn.Module,
    tokenizer: Any,
    text: list[str],
    max_loss: float,
    length: int | None,
    config: SurgeryConfig,
    routers: Mapping[int, Any] | None,
    progress: Progress | None = None,
) -> Within:
    """The highest θ at which perplexity rises by ``max_loss`` at most, with budgets by head where these help.

    That is so where the upper end of the 95% interval of the rise is within ``max_loss``. The interval is
    over blocks of tokens of the windows, on which both models are compared. Decode steps are not measured:
    their θ stays as it is, with ``tile=1`` it follows.

    Heads that have learned budgets, in ``routers``, keep them. Others get those of
    :func:`~llama_surgery.surgery.head_budgets.head_budgets` at the density that one θ for all comes to, and θ
    is set anew; they are kept where the model then reads less. In tiles of one row heads share their pages.

    Args:
        model: A dense decoder in evaluation mode; dense again afterwards.
        text: Documents.
        max_loss: 0.01 is one per cent.
        length: Tokens of a window; the model's context, at most 8,192 and what the text holds, if None.
        config: The topology; the search begins at its θ.
        routers: Learned corrections, as ``operate()`` takes them.
        progress: As ``operate()`` takes it.

    Raises:
        SurgeryError: ``max_loss`` is out of range, or the model cannot be made sparse within it.
        TextError: The text is too short.
    """
    if not 0 < max_loss < 1:
        raise SurgeryError(f"max_loss={max_loss}: must lie between 0 and 1; 0.01 is one per cent.")
    check_dense(model, {})
    ids = calibration_windows(model, tokenizer, text, length, config, WINDOWS)
    with counted(inner_model(model), "dense model", len(ids), progress):
        dense = perplexity(model, ids)

    def search(given: Mapping[int, Any] | None, start: float, stage: str) -> Within:
        with (
            operated(model, config, routers=given),
            counted(inner_model(model), stage, TRIES * len(ids), progress),
        ):

            def measure(theta: float) -> MeasuredLoss:
                set_config(model, with_theta(config, theta))
                reset_statistics(model)
                ratio = perplexity_ratio(_by_block(dense), _by_block(perplexity(model, ids)), seed=0)
                read = statistics(model)
                return MeasuredLoss(
                    max_loss=max_loss,
                    loss=ratio.ratio - 1,
                    low=ratio.low - 1,
                    high=ratio.high - 1,
                    windows=ids.shape[0],
                    length=ids.shape[1],
                    far_density=read.far_density,
                    total_density=read.total_density,
                )

            theta, measured = highest_theta(measure, max_loss, start)
            return Within(with_theta(config, theta), routers_of(model), measured)

    found = search(routers, config.theta, "thresholds")
    if not _sparse(found.measured):
        raise SurgeryError(
            f"max_loss={max_loss}: the model cannot be made sparse within that loss, and is left dense. The "
            f"nearest was {found.measured}. Allow more, or give longer windows if most of that density is "
            "the near field, which is always read."
        )
    budgets = budgets_where_none(model, ids, config, found.routers, found.measured.far_density, progress)
    if budgets is None:
        return found
    by_head = search(budgets.routers, budgets.theta, "thresholds with budgets")
    better = _sparse(by_head.measured) and by_head.measured.total_density < found.measured.total_density
    return by_head if better else found


def _sparse(measured: MeasuredLoss) -> bool:
    return measured.high <= measured.max_loss and measured.total_density <= DENSE


def highest_theta(
    measure: Callable[[float], MeasuredLoss], max_loss: float, start: float
) -> tuple[float, MeasuredLoss]:
    """The highest θ, nearly, at which the upper end of the measured loss is within ``max_loss``.

    ``measure`` says what is lost at a θ, which rises with it; ``start`` is where to begin, if it is within
    what is tried.

    Returns:
        θ and what was measured there. Where no θ that is sparse keeps the limit, the last that was tried.
    """
    at = math.log(min(max(start, math.sqrt(LEAST)), MOST))
    tried: list[tuple[float, MeasuredLoss]] = []
    low, high = math.log(LEAST), math.log(MOST)
    kept: MeasuredLoss | None = None
    for _ in range(TRIES):
        found = measure(math.exp(at))
        tried.append((at, found))
        if found.high <= max_loss:
            low, kept = at, found
            if found.high >= ENOUGH * max_loss:
                break
        else:
            high = at
            if kept is None and found.total_density > DENSE:
                break
        if high - low < _NEAR:
            break
        at = _next(tried, low, high, AIM * max_loss)
    return math.exp(at if kept is None else low), kept or found


def _next(tried: list[tuple[float, MeasuredLoss]], low: float, high: float, aim: float) -> float:
    """The log θ to try next: by the slope of log loss between the last two, well inside what is left."""
    points = [(at, math.log(max(found.high, 0.1 * aim))) for at, found in tried[-2:]]
    (before, one), (at, other) = points[0], points[-1]
    slope = _SLOPE if before == at else min(max((other - one) / (at - before), _SLOPE / 3), 3 * _SLOPE)
    step = min(max((math.log(aim) - other) / slope, -_STRIDE), _STRIDE)
    ends = {math.log(LEAST), math.log(MOST)}  # not tried yet, if they are still there
    margin = 0.15 * (high - low)
    least, most = (end if end in ends else end + side * margin for end, side in ((low, 1), (high, -1)))
    return min(max(at + step, least), most)


def _by_block(losses: Perplexity) -> list[float]:
    """Mean losses of the windows' blocks of about ``BLOCK`` tokens."""
    blocks = -(-losses.nll.shape[1] // BLOCK)
    return [block.mean().item() for window in losses.nll for block in window.tensor_split(blocks)]
