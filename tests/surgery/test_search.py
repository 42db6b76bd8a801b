"""The search that thresholds for a density and for a loss share."""

import math

import pytest

from llama_surgery.surgery.search import Search

SEARCH = Search(-5.0, 5.0, slope=1.0, stride=3.0, enough=0.9, aim=0.95, near=0.05, tries=12)


@pytest.mark.parametrize("slope", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("start", [-9.0, 0.0, 4.0])
def test_it_ends_just_below_the_limit(slope: float, start: float) -> None:
    tried = SEARCH.run(lambda x: math.exp(slope * x), 2.0, start)
    assert 1.8 <= list(tried.values())[-1] <= 2.0
    assert all(-5 <= x <= 5 for x in tried)


def test_a_step_is_closed_in_on_from_both_sides() -> None:
    tried = SEARCH.run(lambda x: 1.0 if x < 1.3 else 9.0, 2.0, 0.0)
    assert max(x for x, found in tried.items() if found <= 2) == pytest.approx(1.3, abs=0.1)


@pytest.mark.parametrize(("constant", "end"), [(1.0, 5.0), (9.0, -5.0)])
def test_what_never_or_always_keeps_the_limit_is_asked_at_the_end(constant: float, end: float) -> None:
    assert list(SEARCH.run(lambda x: constant, 2.0, 0.0))[-1] == end


def test_it_stops_where_the_rest_is_hopeless() -> None:
    assert list(SEARCH.run(lambda x: 9.0, 2.0, 0.0, hopeless=lambda x: True)) == [0.0]
