"""The report in a browser: ``make screenshots`` takes its pictures, this looks at what they cannot show."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import CHROMIUM, Page, browser
from tests.report.test_frontier import POINT

from llama_surgery.report.page import render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

#: Elements that reach beyond the page's right edge and are in no box that scrolls by itself.
BEYOND = """
[...document.body.querySelectorAll("*")].filter(element => {
  if (element.getBoundingClientRect().right <= innerWidth + 0.5) return false;
  for (let outer = element.parentElement; outer; outer = outer.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(outer).overflowX)) return false;
  return true;
}).map(element => `${element.tagName}.${element.getAttribute("class")}`)
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as tab:
        yield tab


@pytest.fixture
def report(results: dict[str, Any], tmp_path: Path) -> Path:
    """With names and texts longer than any phone is wide."""
    results["model"] = "some-organisation/a-model-whose-name-nobody-would-type-135M-Instruct"
    results["conditions"] = {"text": "a-file-without-any-spaces-" * 8}
    (tmp_path / "report.html").write_text(render(results, [POINT]), encoding="utf-8")
    return tmp_path / "report.html"


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (768, False), (1280, True)])
def test_nothing_has_to_be_scrolled_sideways(page: Page, report: Path, width: int, dark: bool) -> None:
    page.open(report, width, 844, dark=dark)
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(BEYOND)
    assert page.evaluate(BEYOND) == []


@pytest.mark.parametrize("width", [320, 1280])
def test_figures_can_be_read(page: Page, report: Path, width: int) -> None:
    page.open(report, width, 844, dark=False)
    heights = page.evaluate(
        '[...document.querySelectorAll("figure svg text")].map(text => text.getBoundingClientRect().height)'
    )
    assert len(heights) > 50 and min(heights) >= 9


def test_dark_is_dark(page: Page, report: Path) -> None:
    """And text stands out from its ground in both: WCAG asks for a ratio of 4.5."""
    for dark in (False, True):
        page.open(report, 390, 844, dark=dark)
        text, ground = (
            _luminance(page.evaluate(f"getComputedStyle(document.body).{name}"))
            for name in ("color", "backgroundColor")
        )
        assert (text > ground) is dark
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
