import math

import numpy as np
import pytest

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import paired_difference, perplexity_ratio, student_quantile


def answers(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    cells = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * won
    pairs = cells + [(False, False)] * neither
    return [d for d, _ in pairs], [o for _, o in pairs]


def test_counts_and_bounds() -> None:
    result = paired_difference(*answers(330, 12, 8, 50))
    assert (result.count, result.lost, result.won) == (400, 12, 8)
    assert result.dense == pytest.approx(342 / 400)
    assert result.operated == pytest.approx(338 / 400)
    assert result.difference == pytest.approx(-0.01)
    # Wald by hand; the adjustment moves it by less than a prompt.
    error = math.sqrt((20 / 400 - 0.01**2) / 400)
    wald = -0.01 - 1.6449 * error
    assert result.low == pytest.approx(wald, abs=1 / 400)


def test_closed_bound_by_hand() -> None:
    result = paired_difference(*answers(7, 2, 1, 0))
    lost, won = 3 / 12, 2 / 12
    error = math.sqrt((lost + won - (won - lost) ** 2) / 12)
    assert result.low == pytest.approx(won - lost - 1.6448536 * error)


def test_models_that_never_disagree_still_have_a_bound_below_zero() -> None:
    assert -0.01 < paired_difference(*answers(380, 0, 0, 20)).low < 0.0


def test_ratio_and_interval() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(3.0, 0.4, size=32)
    operated = dense + rng.normal(0.01, 0.004, size=32)
    result = perplexity_ratio(dense.tolist(), operated.tolist())
    change = operated - dense
    assert result.ratio == pytest.approx(math.exp(change.mean()))
    assert result.count == 32
    # Windows differ by far more than the models do: pairing is what makes the interval narrow.
    half = 2.0395 * change.std(ddof=1) / math.sqrt(32)
    assert result.low == pytest.approx(math.exp(change.mean() - half), abs=1e-7)
    assert result.high == pytest.approx(math.exp(change.mean() + half), abs=1e-7)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (15, 2.1314), (4000, 1.9606)],
)
def test_quantiles_of_student_are_those_of_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=5e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_intervals_of_few_windows_hold_as_often_as_they_say(count: int) -> None:
    losses = np.random.default_rng(0).normal(0.01, 0.004, size=(2000, count))
    intervals = [perplexity_ratio([0.0] * count, row.tolist()) for row in losses]
    held = sum(found.low <= math.exp(0.01) <= found.high for found in intervals)
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_window_has_an_interval_without_end() -> None:
    found = perplexity_ratio([3.0], [3.1])
    assert (found.low, found.high) == (0.0, math.inf) and found.ratio == pytest.approx(math.exp(0.1))


@pytest.mark.parametrize("compare", [paired_difference, perplexity_ratio])
@pytest.mark.parametrize(("dense", "operated"), [([], []), ([1, 0], [1])])
def test_unpaired_samples_are_refused(compare, dense, operated) -> None:
    with pytest.raises(SurgeryError, match=r"same (samples|windows)"):
        compare(dense, operated)
