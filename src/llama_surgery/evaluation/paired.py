"""Statistics of pairs: the same prompt or window answered by both models.

Pairing removes what both have in common (hard prompts, hard windows), so that far fewer samples
show a difference than two separate accuracies would need.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import CONFIDENCE, paired_change

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the operated model minus that of the dense model, over the same prompts.

    Attributes:
        count: Prompts.
        dense: Accuracy of the dense model.
        operated: Accuracy of the operated model.
        difference: ``operated − dense``.
        lost: Prompts that only the dense model answered.
        won: Prompts that only the operated model answered.
        bound_bootstrap: One-sided lower bound of the difference, percentile bootstrap.
        bound_closed: The same in closed form.
        confidence: Of both bounds.
    """

    count: int
    dense: float
    operated: float
    difference: float
    lost: int
    won: int
    bound_bootstrap: float
    bound_closed: float
    confidence: float


def paired_difference(
    dense: Sequence[bool], operated: Sequence[bool], seed: int, confidence: float = CONFIDENCE
) -> PairedDifference:
    """Compares right and wrong answers to the same prompts.

    The closed form is that of :func:`~llama_surgery.evaluation.intervals.paired_change`: it says something
    when the models never disagree, where the bootstrap, which can only draw what it has seen, gives a bound
    of exactly 0.

    Args:
        dense: Whether the dense model answered each prompt.
        operated: The same for the operated model, in the same order.
        seed: Of the bootstrap.
        confidence: Of the one-sided bounds.

    Raises:
        SurgeryError: The two differ in length or are empty.
    """
    if len(dense) != len(operated) or not len(dense):
        raise SurgeryError(
            f"{len(dense)} dense and {len(operated)} operated answers: both models must have "
            "answered the same prompts, at least one."
        )
    sides = [float(right) for right in dense], [float(right) for right in operated]
    change = paired_change([sides], 2 * confidence - 1)  # its lower end is the one-sided bound
    count, lost, won = change.count, change.lost, change.won

    # Resampling n prompts with replacement draws the number of lost, equal and won ones from a
    # multinomial: the same bootstrap, without a (resamples × prompts) table.
    shares = np.array([lost, count - lost - won, won]) / count
    draws = _generator(seed).multinomial(count, shares, size=RESAMPLES)
    return PairedDifference(
        count=count,
        dense=change.dense,
        operated=change.operated,
        difference=(won - lost) / count,
        lost=lost,
        won=won,
        bound_bootstrap=float(np.quantile((draws[:, 2] - draws[:, 0]) / count, 1 - confidence)),
        bound_closed=change.low,
        confidence=confidence,
    )


@dataclasses.dataclass(frozen=True)
class RatioInterval:
    """Perplexity of the operated model over that of the dense model, over the same windows.

    Attributes:
        ratio: Of the perplexities over all windows.
        low: Lower end of the two-sided interval over windows.
        high: Upper end.
        confidence: Of the interval.
        count: Windows.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    count: int


def perplexity_ratio(
    dense: Sequence[float], operated: Sequence[float], seed: int, confidence: float = CONFIDENCE
) -> RatioInterval:
    """Ratio of two perplexities with a bootstrap over windows (percentiles).

    Args:
        dense: Mean loss of the dense model on each window, nats per token; windows of one length.
        operated: The same for the operated model, in the same order.
        seed: Of the bootstrap.
        confidence: Of the two-sided interval. With fewer than about ten windows it is too narrow.

    Raises:
        SurgeryError: The two differ in length or are empty.
    """
    if len(dense) != len(operated) or not len(dense):
        raise SurgeryError(
            f"{len(dense)} dense and {len(operated)} operated windows: both models must have been "
            "measured on the same windows, at least one."
        )
    change = np.asarray(operated, dtype=np.float64) - np.asarray(dense, dtype=np.float64)
    picks = _generator(seed).integers(0, len(change), size=(RESAMPLES, len(change)))
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(change[picks].mean(axis=1), [tail, 1 - tail]))
    return RatioInterval(
        ratio=math.exp(change.mean()),
        low=float(low),
        high=float(high),
        confidence=confidence,
        count=len(change),
    )


def _generator(seed: int) -> np.random.Generator:
    """Random numbers of a seed, which may be negative as it may be for windows and prompts."""
    return np.random.default_rng(seed % 2**63)
