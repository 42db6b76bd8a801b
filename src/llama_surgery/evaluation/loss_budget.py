"""Thresholds for a loss: the highest θ at which a model loses no more than that, found on a little text."""

import dataclasses
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
from llama_surgery.surgery.search import Search
from llama_surgery.surgery.supported import inner_model

#: Windows of text, spread over the documents: more than for a density, since losses vary more than shares.
WINDOWS = 8
#: Tokens of a window that the interval counts as one sample. Windows are too few to be samples themselves;
#: losses of neighbouring tokens depend on each other, those of neighbouring blocks hardly do.
BLOCK = 512
#: Total density from which on a model counts as not sparse: selection costs what little is saved.
DENSE = 0.75
#: For log θ; the slope is that of SmolLM2-135M at 4,096 tokens. In sharp heads more than the whole is
#: expected of a page.
SEARCH = Search(
    math.log(1e-6), math.log(100), slope=1.4, stride=math.log(10), enough=0.85, aim=0.95, near=0.1, tries=10
)


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
    if isinstance(max_loss, str) or not 0 < max_loss < 1:
        raise SurgeryError(f"max_loss={max_loss!r}: must lie between 0 and 1; 0.01 is one per cent.")
    check_dense(model, {})
    ids = calibration_windows(model, tokenizer, text, length, config, WINDOWS)
    config = dataclasses.replace(config, theta_length=ids.shape[1])
    with counted(inner_model(model), "dense model", len(ids), progress):
        dense = perplexity(model, ids)

    def search(given: Mapping[int, Any] | None, start: float, stage: str) -> Within:
        with (
            operated(model, config, routers=given),
            counted(inner_model(model), stage, SEARCH.tries * len(ids), progress),
        ):

            def measure(theta: float) -> MeasuredLoss:
                set_config(model, with_theta(config, theta))
                reset_statistics(model)
                ratio = perplexity_ratio(_by_block(dense), _by_block(perplexity(model, ids)))
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
    found: dict[float, MeasuredLoss] = {}

    def high(x: float) -> float:
        return found.setdefault(x, measure(math.exp(x))).high

    def hopeless(x: float) -> bool:
        return found[x].total_density > DENSE

    tried = SEARCH.run(high, max_loss, math.log(start or SurgeryConfig().theta), hopeless)
    best = max((x for x, loss in tried.items() if loss <= max_loss), default=list(tried)[-1])
    return math.exp(best), found[best]


def _by_block(losses: Perplexity) -> list[float]:
    """Mean losses of the windows' blocks of about ``BLOCK`` tokens, at least two of each."""
    blocks = max(2, -(-losses.nll.shape[1] // BLOCK))
    return [block.mean().item() for window in losses.nll for block in window.tensor_split(blocks)]
