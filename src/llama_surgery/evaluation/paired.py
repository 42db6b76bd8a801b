"""Statistics of pairs: the same prompt or window answered by both models.

Pairing removes what both have in common (hard prompts, hard windows), so that far fewer samples
show a difference than two separate accuracies would need.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import CONFIDENCE, Change, paired_change

RESAMPLES = 10_000


def paired_difference(dense: Sequence[bool], operated: Sequence[bool]) -> Change:
    """Compares right and wrong answers to the same prompts.

    ``low`` is the one-sided 95% bound of the difference, in the closed form of
    :func:`~llama_surgery.evaluation.intervals.paired_change`.

    Args:
        dense: Whether the dense model answered each prompt.
        operated: The same for the operated model, in the same order.

    Raises:
        SurgeryError: The two differ in length or are empty.
    """
    sides = [float(right) for right in dense], [float(right) for right in operated]
    return paired_change([sides], 2 * CONFIDENCE - 1)


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


def perplexity_ratio(dense: Sequence[float], operated: Sequence[float], seed: int) -> RatioInterval:
    """Ratio of two perplexities with a bootstrap over windows (percentiles).

    With fewer than about ten windows its interval, of :data:`CONFIDENCE`, is too narrow.

    Args:
        dense: Mean loss of the dense model on each window, nats per token; windows of one length.
        operated: The same for the operated model, in the same order.
        seed: Of the bootstrap.

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
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(change[picks].mean(axis=1), [tail, 1 - tail]))
    return RatioInterval(
        ratio=math.exp(change.mean()),
        low=float(low),
        high=float(high),
        confidence=CONFIDENCE,
        count=len(change),
    )


def _generator(seed: int) -> np.random.Generator:
    """Random numbers of a seed, which may be negative as it may be for windows and prompts."""
    return np.random.default_rng(seed % 2**63)
