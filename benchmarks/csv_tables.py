"""Rows of the CSV files in benchmarks/results, and how they are written in a table."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from llama_surgery.files import write_csv

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]


#: Options that are gone, and the value of rows that were measured as things are without them.
GONE = {"directions": ("principal", "")}


def read(name: str) -> list[Row]:
    """Rows of a file, without those of options that are gone: these stay in it as an archive."""
    rows = rows_of(RESULTS / name)
    return [row for row in rows if all(row.get(option, "") in kept for option, kept in GONE.items())]


def rows_of(file: Path) -> list[Row]:
    """All rows of a CSV, as they are."""
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def merge(
    file: Path,
    rows: Iterable[dict[str, Any]],
    columns: Sequence[str] | None,
    keys: Sequence[str],
    place: Callable[[tuple[str, ...]], Any] = lambda key: 0,
) -> None:
    """Puts rows into a CSV, in place of those of the same name; others stay, other processes' too.

    Args:
        file: The CSV; it need not be there.
        rows: With all ``columns``.
        columns: Of the file; those of all its rows if None.
        keys: Columns that tell rows apart.
        place: What rows are ordered by, from the values of ``keys``; as they come if left out.
    """

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in keys)

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        kept: dict[tuple[str, ...], dict[str, Any]] = {}
        if file.exists():
            kept = {key(row): row for row in rows_of(file)}
        kept |= {key(row): row for row in rows}
        if kept:
            ordered = [kept[one] for one in sorted(kept, key=place)]
            write_csv(file, [{name: row[name] for name in columns or row} for row in ordered])


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


def ratio_told(row: Row, column: str = "ratio") -> str:
    """Perplexity over dense, of ``column``, and its interval."""
    if not row[column]:
        return "–"
    ratio, low, high = (float(row[name]) for name in (column, "ratio_low", "ratio_high"))
    return f"{ratio:.4f} ({low:.4f} … {high:.4f})"


def tokens(value: str) -> str:
    return f"{int(value):,}"


def conditions(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, PyTorch {row['torch']}, Triton {row['triton']}, {row['date']}."
