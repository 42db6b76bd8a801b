"""The page: complete, self-contained, the same every time."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_frontier import POINT, write

from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_json
from llama_surgery.report import results as summary
from llama_surgery.report.page import render, write_report
from llama_surgery.report.results import read_results


class Outline(HTMLParser):
    """Section ids, headings, and addresses that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(given.get("id") or given.get("class") or "")
        for name in ("src", "href", "xlink:href"):
            value = given.get(name)
            if value is not None and not value.startswith(("#", "data:")):
                self.loaded.append(value)


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    return parser


def test_every_section_is_there_and_nothing_is_loaded(results: dict[str, Any]) -> None:
    html = render(results, [POINT, dataclasses.replace(POINT, far_density=0.12, ppl_ratio=1.002)])
    seen = outline(html)
    assert seen.sections == ["summary", "frontier", "position", "needles", "density", "tree"]
    assert seen.loaded == []
    assert not re.search(r"@import|url\(\s*['\"]?http|<script", html)
    assert html.count('role="img"') == 5


def test_what_was_not_measured_is_left_out(results: dict[str, Any]) -> None:
    results |= {"needles": [], "trees": []}
    results["dense"]["needle_accuracy"] = results["operated"][0]["needle_accuracy"] = None
    assert outline(render(results, [])).sections == ["summary", "position", "density"]


def test_text_from_outside_is_escaped(results: dict[str, Any]) -> None:
    results["model"] = "<script>alert(1)</script>"
    html = render(results, [])
    assert "<script" not in html and "&lt;b&gt;" in html


def test_the_same_results_give_the_same_page(results: dict[str, Any]) -> None:
    assert render(results, [POINT]) == render(results, [POINT])


def test_conditions_are_complete(results: dict[str, Any]) -> None:
    html = render(results, [])
    for told in ("books-26m, float32", "2 threads", "1,024 tokens", "PyTorch 2.13.0", "θ = 4.000%", "seed"):
        assert told in html


def test_results_survive_their_file(results: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", results)
    read = read_results(tmp_path / "r.json")
    assert read == results
    write_report(read, tmp_path / "r.html", frontier=write(tmp_path / "f.csv", [POINT]))
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == render(results, [POINT])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "not a results file"),
        (json.dumps({"format": "llama-surgery results", "format_version": 99}), "Update llama-surgery"),
        (
            json.dumps({"format": "llama-surgery results", "format_version": 1}),
            "lacks model, .*evaluate --text",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SurgeryError, match=told):
        read_results(path)


@pytest.mark.parametrize("wrong", [{"length": "x"}, {"conditions": []}, {"environment": 3}])
def test_results_of_another_kind_are_refused(results: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match="damaged"):
        render({**results, **wrong}, [])


def test_layers_are_numbers(results: dict[str, Any]) -> None:
    by_layer = results["operated"][0]["density"]["by_layer"]
    by_layer["first"] = by_layer.pop("0")
    with pytest.raises(SurgeryError, match=r"damaged.*first"):
        render(results, [])


def test_results_that_lack_a_part_are_refused(results: dict[str, Any]) -> None:
    del results["operated"][0]["ratio"]
    with pytest.raises(SurgeryError, match="ratio"):
        render(results, [])


def test_the_summary_says_how_sure_it_is_only_with_enough_samples(results: dict[str, Any]) -> None:
    def notes() -> str:
        return " ".join(cell.note for row in summary.rows(results) for cell in row.cells)

    assert "sure" not in notes() and "…" not in notes()
    results["operated"][0]["ratio"]["count"] = 16
    results["operated"][0]["needle"]["count"] = 400
    assert "1.0010 … 1.0080" in notes() and "95% sure of ≥ -100.0" in notes()


def test_times_are_compared_with_dense(results: dict[str, Any]) -> None:
    rows = {row.name: row.cells for row in summary.rows(results)}
    assert rows["Prefill"][1].note == "2.00× as fast" == rows["Decode"][1].note
