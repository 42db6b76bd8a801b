"""Rows of the CSV files in benchmarks/results, and how they are written in a table."""

import csv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]


#: Options that are gone, and the value of rows that were measured as things are without them.
GONE = {"directions": ("principal", "")}


def read(name: str) -> list[Row]:
    """Rows of a file, without those of options that are gone: these stay in it as an archive."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row.get(option, "") in kept for option, kept in GONE.items())]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def same(one: Row, other: Row, *names: str) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def percent(value: str) -> str:
    return f"{float(value):.1%}" if value else "–"


def milliseconds(value: str) -> str:
    return f"{float(value):.3g}" if float(value) < 1000 else f"{float(value):,.0f}"


def times(value: str | None) -> str:
    return f"{float(value):.1f} ×" if value else "–"


def tokens(value: str) -> str:
    return f"{int(value):,}"


def conditions(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, PyTorch {row['torch']}, Triton {row['triton']}, {row['date']}."
