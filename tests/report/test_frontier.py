"""The frontier: reading the CSV, and the Pareto front."""

import csv
import dataclasses
from pathlib import Path

import pytest

from llama_surgery.errors import SurgeryError
from llama_surgery.report.frontier import COLUMNS, FrontierPoint, pareto, read_frontier

POINT = FrontierPoint(
    page_size=64,
    chunk_size=512,
    window=128,
    tile=32,
    scoring="all rows",
    theta=0.042,
    far_density=0.06,
    total_density=0.16,
    ppl=20.3,
    ppl_ratio=1.007,
    ratio_low=1.005,
    ratio_high=1.009,
    needle=0.88,
    dense_ppl=20.16,
    dense_needle=0.9,
    windows=16,
    needles=400,
    length=8192,
    seed=0,
    model="books-26m",
)


def write(path: Path, points: list[FrontierPoint], columns: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(point) for point in points)
    return path


def test_points_survive_the_csv(tmp_path: Path) -> None:
    points = [POINT, dataclasses.replace(POINT, tile=1)]
    assert read_frontier(write(tmp_path / "f.csv", points)) == points


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [POINT])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_frontier(path) == [POINT]


@pytest.mark.parametrize("content", [b"page_size\0,theta\n1,2\n", b"\xff\xfea\0", b'"' + b"a" * 200_000])
def test_what_is_no_table_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(SurgeryError, match=r"could not read the frontier|columns .* are missing"):
        read_frontier(tmp_path / "f.csv")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [POINT], tuple(c for c in COLUMNS if c != "ratio_low"))
    with pytest.raises(SurgeryError, match="ratio_low"):
        read_frontier(path)


def test_a_value_that_is_no_number_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [POINT])
    path.write_text(path.read_text(encoding="utf-8").replace("1.007", "good"), encoding="utf-8")
    with pytest.raises(SurgeryError, match="line 2: ppl_ratio='good'"):
        read_frontier(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="nowhere"):
        read_frontier(tmp_path / "nowhere.csv")


def test_the_front_has_no_beaten_point() -> None:
    pairs = [(0.12, 1.004), (0.03, 1.02), (0.06, 1.007), (0.06, 1.03), (0.13, 1.005)]
    points = [dataclasses.replace(POINT, far_density=x, ppl_ratio=y) for x, y in pairs]
    assert [(p.far_density, p.ppl_ratio) for p in pareto(points)] == [
        (0.03, 1.02),
        (0.06, 1.007),
        (0.12, 1.004),
    ]


def test_the_needle_interval_holds_what_was_measured() -> None:
    low, high = POINT.needle_interval
    assert 0.84 < low < POINT.needle < high < 0.92
    low, high = dataclasses.replace(POINT, needle=1.0, needles=20).needle_interval
    assert 0.8 < low < 0.9 and high == pytest.approx(1)
