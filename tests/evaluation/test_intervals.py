"""Intervals against worked values, and by simulation."""

import random

import pytest

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import mean_interval, paired_change, paired_difference


def test_mean_interval_is_wilsons_for_right_and_wrong() -> None:
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I: 81 of 263.
    mean, low, high = mean_interval([1.0] * 81 + [0.0] * 182)
    assert (mean, low, high) == (
        pytest.approx(81 / 263),
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )
    assert mean_interval([1.0] * 10)[2] == 1 and mean_interval([1.0] * 10)[1] < 0.75


def test_one_group_of_right_and_wrong_is_the_closed_form_of_pairs() -> None:
    dense = [True] * 8 + [False] * 4
    operated = [True] * 5 + [False] * 6 + [True]
    change = paired_change([([*map(float, dense)], [*map(float, operated)])], confidence=0.9)
    # A two-sided 90% interval begins where the one-sided 95% bound is.
    assert change.low == pytest.approx(paired_difference(dense, operated).low)
    assert (change.lost, change.won, change.count) == (3, 1, 12)


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_intervals_hold_as_often_as_they_say(loss) -> None:
    rng = random.Random(0)
    held = trials = 0
    for _ in range(600):
        groups = []
        for skill in (0.3, 0.9):
            dense = [float(rng.random() < skill) for _ in range(30)]
            groups.append((dense, [s * (rng.random() >= loss) for s in dense]))
        change = paired_change(groups)
        true = -loss * (0.3 + 0.9) / 2
        held += change.low <= true <= change.high
        trials += 1
    assert held / trials >= 0.93


def test_samples_must_be_pairs() -> None:
    with pytest.raises(SurgeryError, match="the same samples"):
        paired_change([([1.0], [1.0, 0.0])])
    with pytest.raises(SurgeryError, match="no score"):
        mean_interval([])
