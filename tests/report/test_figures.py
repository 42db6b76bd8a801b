"""Figures: they draw what they are given, at the edges too."""

import pytest
from tests.report.test_frontier import POINT

from llama_surgery.report import figures, frontier
from llama_surgery.report.figures import NeedleCell
from llama_surgery.report.tree import page_name


@pytest.mark.parametrize(("page", "name"), [(0, "A"), (25, "Z"), (26, "AA"), (51, "AZ"), (52, "BA")])
def test_pages_are_named_like_columns(page: int, name: str) -> None:
    assert page_name(page) == name


def test_needle_cells_say_answered_and_asked() -> None:
    cells = [NeedleCell(2048, 0.25, 1, 4), NeedleCell(8192, 0.75, 3, 3)]
    svg = figures.needle_grids({"dense": cells, "operated": cells[:1]})
    assert svg.count(">1/4<") == 2 and svg.count(">3/3<") == 1
    assert ">dense: 4/7<" in svg and ">2,048<" in svg and ">75%<" in svg


def test_a_head_that_reads_nothing_is_drawn() -> None:
    silent = {0: {"far_density": [0.0, 0.0], "near_density": 1.0}}
    assert ">0.0<" in figures.head_density(silent)
    assert ">100.0%<" in figures.layer_density(silent)


def test_many_heads_are_drawn_without_numbers() -> None:
    wide = {0: {"far_density": [0.0123] * 32, "near_density": 0.1}}
    assert ">1.2<" not in figures.head_density(wide)


def test_one_point_is_a_frontier() -> None:
    svg = frontier.frontier([POINT])
    assert ">tile 32<" in svg and ">Pareto front<" in svg


def test_descriptions_are_escaped() -> None:
    svg = figures.needle_grids({'a "b" <c>': [NeedleCell(1024, 0.5, 1, 1)]})
    assert "&quot;b&quot; &lt;c>" in svg
