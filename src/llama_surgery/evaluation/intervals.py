"""Intervals of scores between 0 and 1, alone and paired."""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

from llama_surgery.errors import SurgeryError

CONFIDENCE = 0.95


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of scores with its two-sided interval of :data:`CONFIDENCE`.

    Wilson's (1927) score interval of a proportion, with the mean in its place. Scores within 0…1 vary at
    most as much as right and wrong answers of the same mean, so for partial scores it is rather too wide.

    Args:
        scores: Each 0…1.

    Returns:
        Mean, low, high.

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
    """Scores of the operated model minus those of the dense one, over the same samples.

    Attributes:
        count: Samples.
        dense: Mean score of the dense model.
        operated: Mean score of the operated model.
        difference: ``operated − dense``.
        low, high: Two-sided interval of the difference.
        lost: Samples on which the operated model scored lower.
        won: Samples on which it scored higher.
        confidence: Of the interval.
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
    changes = [[b - a for a, b in zip(dense, operated, strict=True)] for dense, operated in groups]
    gaps, variances = [], []
    for change in changes:
        count = len(change) + 2
        gap = math.fsum(change) / count
        square = (math.fsum(d * d for d in change) + 2) / count
        gaps.append(gap)
        variances.append((square - gap**2) / count)
    centre = math.fsum(gaps) / len(gaps)
    half = _quantile(1 - (1 - confidence) / comparisons) * math.sqrt(math.fsum(variances)) / len(gaps)
    dense, operated = (
        math.fsum(math.fsum(group[side]) / len(group[side]) for group in groups) / len(groups)
        for side in (0, 1)
    )
    return Change(
        count=sum(map(len, changes)),
        dense=dense,
        operated=operated,
        difference=operated - dense,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        lost=sum(d < 0 for change in changes for d in change),
        won=sum(d > 0 for change in changes for d in change),
        confidence=confidence,
    )


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(1 - (1 - confidence) / 2)
