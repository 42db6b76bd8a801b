import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.paired import paired_difference, perplexity_ratio


def answers(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    cells = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * won
    pairs = cells + [(False, False)] * neither
    return [d for d, _ in pairs], [o for _, o in pairs]


def test_counts_and_bounds() -> None:
    result = paired_difference(*answers(330, 12, 8, 50), seed=0)
    assert (result.count, result.lost, result.won) == (400, 12, 8)
    assert result.dense == pytest.approx(342 / 400)
    assert result.operated == pytest.approx(338 / 400)
    assert result.difference == pytest.approx(-0.01)
    # Wald by hand; the adjustment and the bootstrap move it by less than a prompt.
    error = math.sqrt((20 / 400 - 0.01**2) / 400)
    wald = -0.01 - 1.6449 * error
    assert result.bound_closed == pytest.approx(wald, abs=1 / 400)
    assert result.bound_bootstrap == pytest.approx(wald, abs=1 / 400)


def test_closed_bound_by_hand() -> None:
    result = paired_difference(*answers(7, 2, 1, 0), seed=0)
    lost, won = 3 / 12, 2 / 12
    error = math.sqrt((lost + won - (won - lost) ** 2) / 12)
    assert result.bound_closed == pytest.approx(won - lost - 1.6448536 * error)


def test_bootstrap_equals_resampling_the_prompts() -> None:
    dense, operated = answers(40, 9, 3, 8)
    change = np.array(operated, int) - np.array(dense, int)
    rng = np.random.default_rng(5)
    means = change[rng.integers(0, 60, (20_000, 60))].mean(axis=1)
    result = paired_difference(dense, operated, seed=0)
    assert result.bound_bootstrap == pytest.approx(np.quantile(means, 0.05), abs=1.01 / 60)


def test_models_that_never_disagree_still_have_a_bound_below_zero() -> None:
    result = paired_difference(*answers(380, 0, 0, 20), seed=0)
    assert result.bound_bootstrap == 0.0
    assert -0.01 < result.bound_closed < 0.0


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
    st.integers(min_value=0, max_value=2**31),
)
def test_bounds_are_below_the_difference_and_reproducible(pairs: list[tuple[bool, bool]], seed: int) -> None:
    dense, operated = [d for d, _ in pairs], [o for _, o in pairs]
    result = paired_difference(dense, operated, seed)
    assert -1.0 <= result.bound_bootstrap <= result.difference + 1e-12
    assert result == paired_difference(dense, operated, seed)


def test_ratio_and_interval() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(3.0, 0.4, size=32)
    operated = dense + rng.normal(0.01, 0.004, size=32)
    result = perplexity_ratio(dense.tolist(), operated.tolist(), seed=1)
    change = operated - dense
    assert result.ratio == pytest.approx(math.exp(change.mean()))
    assert result.count == 32
    # Windows differ by far more than the models do: pairing is what makes the interval narrow.
    half = 1.96 * change.std() / math.sqrt(32)
    assert result.low == pytest.approx(math.exp(change.mean() - half), abs=3e-4)
    assert result.high == pytest.approx(math.exp(change.mean() + half), abs=3e-4)
    assert result == perplexity_ratio(dense.tolist(), operated.tolist(), seed=1)


@pytest.mark.parametrize("compare", [paired_difference, perplexity_ratio])
@pytest.mark.parametrize(("dense", "operated"), [([], []), ([1, 0], [1])])
def test_unpaired_samples_are_refused(compare, dense, operated) -> None:
    with pytest.raises(SurgeryError, match=r"same (prompts|windows)"):
        compare(dense, operated, seed=0)


def test_a_negative_seed_is_a_seed_like_any_other() -> None:
    """Windows and prompts are drawn with it before, hours of work ago."""
    answers = [True, False] * 20, [True, True, False, False] * 10
    assert paired_difference(*answers, seed=-1) == paired_difference(*answers, seed=-1)
    losses = [1.0, 2.0, 3.0], [1.1, 2.0, 3.3]
    assert perplexity_ratio(*losses, seed=-1) == perplexity_ratio(*losses, seed=-1)
