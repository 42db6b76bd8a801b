"""Intervals of scores and of perplexities, alone and paired.

Pairing removes what both models have in common (hard prompts, hard windows), so that far fewer samples show a
difference than two separate accuracies would need.
"""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from llama_surgery.errors import SurgeryError

CONFIDENCE = 0.95


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of scores, each 0…1, with its two-sided interval of :data:`CONFIDENCE`: mean, low, high.

    Wilson's (1927) score interval of a proportion, with the mean in its place. Scores within 0…1 vary at
    most as much as right and wrong answers of the same mean, so for partial scores it is rather too wide.

    Raises:
        SurgeryError: There is no score.
    """
    if not scores:
        raise SurgeryError("no score: at least one sample is needed.")
    mean = math.fsum(scores) / len(scores)
    return mean, *wilson(mean, len(scores))


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The interval of :func:`mean_interval`, for ``count`` scores."""
    z = _quantile(CONFIDENCE)
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Change:
    """Scores of the operated model minus those of the dense one, over the same ``count`` samples.

    Attributes:
        dense, operated: Mean scores; ``difference`` is ``operated − dense``.
        low, high: Two-sided interval of the difference, of ``confidence``.
        lost, won: Samples on which the operated model scored lower, and higher.
    """

    count: int
    dense: float
    operated: float
    difference: float
    low: float
    high: float
    lost: int
    won: int
    confidence: float


def paired_change(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]],
    confidence: float = CONFIDENCE,
    comparisons: int = 1,
) -> Change:
    """Compares scores of the same samples: the mean over groups, each counting alike.

    Within a group it is the adjusted Wald interval of Bonett and Price (2012), with differences of
    scores in place of right and wrong: one sample that lost everything and one that won everything are
    added. So it says something even where the models never disagree. Groups are independent strata.

    Args:
        groups: For each task, say, the dense model's scores and the operated model's, in the same order.
        confidence: Of the two-sided interval.
        comparisons: Intervals that shall hold together (Bonferroni): each is then wider.

    Raises:
        SurgeryError: There is no group, one is empty, or its two sides differ in length.
    """
    if not groups or any(not dense or len(dense) != len(operated) for dense, operated in groups):
        sizes = [(len(dense), len(operated)) for dense, operated in groups]
        raise SurgeryError(
            f"dense and operated scores {sizes}: both models must have answered the same samples, at least "
            "one."
        )
    changes = [np.subtract(operated, dense, dtype=np.float64) for dense, operated in groups]
    counts = np.array([len(change) + 2 for change in changes])
    gaps = np.array([change.sum() for change in changes]) / counts
    squares = (np.array([(change**2).sum() for change in changes]) + 2) / counts
    spread = math.sqrt(((squares - gaps**2) / counts).sum()) / len(gaps)
    centre, half = gaps.mean(), _quantile(1 - (1 - confidence) / comparisons) * spread
    means = [float(np.mean([np.mean(group[side]) for group in groups])) for side in (0, 1)]
    every = np.concatenate(changes)
    return Change(
        count=len(every),
        dense=means[0],
        operated=means[1],
        difference=means[1] - means[0],
        low=float(max(-1.0, centre - half)),
        high=float(min(1.0, centre + half)),
        lost=int((every < 0).sum()),
        won=int((every > 0).sum()),
        confidence=confidence,
    )


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(1 - (1 - confidence) / 2)


def paired_difference(dense: Sequence[bool], operated: Sequence[bool]) -> Change:
    """:func:`paired_change` of right and wrong answers, whose ``low`` is its one-sided 95% bound."""
    return paired_change([(dense, operated)], 2 * CONFIDENCE - 1)


@dataclasses.dataclass(frozen=True)
class RatioInterval:
    """Perplexity over that of the dense model, with the two-sided interval over ``count`` windows."""

    ratio: float
    low: float
    high: float
    confidence: float
    count: int


def perplexity_ratio(dense: Sequence[float], operated: Sequence[float]) -> RatioInterval:
    """Ratio of two perplexities, with Student's interval of :data:`CONFIDENCE` over windows.

    Of few windows it is wide, of one it is without end.

    Args:
        dense, operated: Mean losses on the same windows of one length, nats per token.

    Raises:
        SurgeryError: The two differ in length or are empty.
    """
    count = len(dense)
    if count != len(operated) or not count:
        raise SurgeryError(
            f"{count} dense and {len(operated)} operated windows: both models must have been "
            "measured on the same windows, at least one."
        )
    change = np.subtract(operated, dense, dtype=np.float64)
    mean, half = change.mean(), math.inf
    if count > 1:
        half = student_quantile(CONFIDENCE, count - 1) * change.std(ddof=1) / math.sqrt(count)
    ratio, low, high = (math.exp(end) for end in (mean, mean - half, mean + half))
    return RatioInterval(ratio=ratio, low=low, high=high, confidence=CONFIDENCE, count=count)


def student_quantile(confidence: float, freedom: int) -> float:
    """What Student's t of ``freedom`` degrees stays within, on both sides, with that probability.

    By bisection of its distribution function, a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    odd, low, high = freedom % 2, 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        within, term = odd * angle, math.sin(angle) * math.cos(angle) ** odd
        for power in range(odd, freedom - 1, 2):
            within += term
            term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        low, high = (low, angle) if within * (2 / math.pi) ** odd > confidence else (angle, high)
    return math.sqrt(freedom) * math.tan(angle)
