"""The table of benchmarks/real_speed.py: times beside what the same settings lose, by real_quality.csv."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from csv_tables import RESULTS, Row, markdown, merge, milliseconds, percent, ratio_told, rows_of, tokens
from timing.parts import FIRST, GRAPHED, PARTS, STEP

COLUMNS = (
    *("model", "length", "text", "part", "settings", "far_density", "total_density", "dense_until"),
    *("quality_model", "quality_length", "quality_settings", "ratio_quality"),
    *("ms", "rival", "rival_ms", "speedup", "peak_bytes", "rival_peak_bytes", "alternations"),
    *("device", "torch", "triton", "transformers", "date"),
)
#: What tells rows apart.
KEYS = (*COLUMNS[:5], "dense_until", "device", "torch", "triton", "transformers")
#: What calibration finds, so that it may differ by the length and the state of the code.
_FOUND = ("theta", "theta_decode", "budgets")
#: Share by which the far density of other text than θ was set on may miss the one asked for.
_NEAR = 0.25
FILE = RESULTS / "real_speed.csv"
_NOTHING = "Not measured yet."


def quality_of(
    rows: Iterable[Row], model: str, length: int, text: str, settings: dict[str, Any], density: float | None
) -> Row | None:
    """The row of real_quality.csv that says what settings lose.

    Args:
        rows: Of that file.
        model, length, text: What was timed. A row of the very settings comes first, whatever its length, then
            one of the same length, then that of the longest.
        settings: As rows have them.
        density: Far density that θ was calibrated to: then a row with another θ will do whose own far density
            is within a quarter of it. None where θ was given: it must be the row's.

    Returns:
        None where nothing was measured with these settings.
    """
    found = []
    for row in rows:
        own = json.loads(row["settings"])
        same = own == settings
        if not same and density is not None and row["far_density"]:
            near = abs(float(row["far_density"]) - density) <= _NEAR * density
            same = near and _without(own) == _without(settings)
        if same and (row["model"], row["text"], row["form"]) == (model, text, "operated"):
            exact = own == settings
            found.append(((exact, int(row["length"]) == length, int(row["length"]), row["date"]), row))
    return max(found, key=lambda one: one[0])[1] if found else None


def _without(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _FOUND}


def update(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts rows into the CSV in place of those of the same name; others stay."""

    def place(key: tuple[str, ...]) -> tuple[Any, ...]:
        model, length, text, part, settings, until, *where = key
        return model, text, settings, int(length), int(until), PARTS.index(part), where

    merge(file, rows, COLUMNS, KEYS, place)


def measured(file: Path, wanted: Mapping[str, Any]) -> set[tuple[int, str]]:
    """Length and part of what the CSV has; ``wanted`` are the other :data:`KEYS`."""
    rows = rows_of(file) if file.exists() else []
    same = [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]
    return {(int(row["length"]), row["part"]) for row in same}


def real_speed() -> str:
    """All that was timed: every model, length and part."""
    cells = []
    for row in (rows := _rows()):
        peak = float(row["peak_bytes"]) / float(row["rival_peak_bytes"]) if row["peak_bytes"] else None
        cells.append(
            [
                _model(row), tokens(row["length"]), row["part"], tokens(row["dense_until"]),
                percent(row["total_density"]),
                milliseconds(row["ms"]), milliseconds(row["rival_ms"]), row["rival"],
                f"{float(row['speedup']):.2f} ×", "–" if peak is None else f"{peak:.2f}", row["alternations"],
            ]
        )  # fmt: skip
    names = (
        "model", "tokens", "", "dense below", "total density", "milliseconds", "dense, milliseconds", "by",
        "faster", "peak memory ÷ dense", "turns",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{_conditions(rows)}" if rows else _NOTHING


def lost_and_won() -> str:
    """A row a model, one configuration: what it loses, and how much faster it is.

    Of the newest settings the longest prompt whose quality was measured; what was measured at a shorter
    length, or with no row dense, says so.
    """
    rows, quality = _rows(), rows_of(RESULTS / "real_quality.csv")
    cells = []
    for name in dict.fromkeys(row["model"] for row in rows):
        first = [row for row in rows if row["model"] == name and row["part"] == FIRST]
        known = [row for row in first if row["quality_model"]] or first
        if not known:
            continue
        row = max(known, key=lambda row: (row["date"], int(row["length"]), int(row["dense_until"])))
        cells.append(_line(row, rows, quality))
    names = (
        "model", "tokens", "dense below", "pairs read, of all", "perplexity ÷ dense (95% interval)",
        "facts kept", "RULER, points", "first token", "decode step", "the same in a CUDA graph",
    )  # fmt: skip
    return markdown(names, cells) + f"\n\n{_conditions(rows)}" if rows else _NOTHING


def _line(row: Row, rows: list[Row], quality: list[Row]) -> list[str]:
    def same(part: str) -> str:
        found = [r for r in rows if r["part"] == part and all(r[k] == row[k] for k in KEYS if k != "part")]
        return f"{float(found[0]['speedup']):.2f} ×" if found else "–"

    times, until = [same(part) for part in (FIRST, STEP, GRAPHED)], int(row["dense_until"])
    shown = [_model(row), tokens(row["length"]), tokens(str(until)), percent(row["total_density"])]
    if until >= int(row["length"]):
        return [*shown, "1: all is dense", "all", "–", *times]
    kept = ["–"] * 3
    wanted = [row[f"quality_{name}"] for name in ("model", "length", "settings")]
    for one in quality:
        if [one["model"], one["length"], one["settings"], one["text"]] != [*wanted, row["text"]]:
            continue
        at = "" if one["length"] == row["length"] else f", at {tokens(one['length'])} tokens"
        at += ", no row dense" if until else ""
        points = f"{float(one['ruler']) - float(one['ruler_dense']):+.1f}" if one["ruler"] else "–"
        kept = [f"{ratio_told(one)}{at}", percent(one["needles_kept"]), points]
    return [*shown, *kept, *times]


def _rows() -> list[Row]:
    return rows_of(FILE) if FILE.exists() else []


def _model(row: Row) -> str:
    return row["model"].removesuffix(".gguf")


def _conditions(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    versions = f"PyTorch {all_of('torch')}, Triton {all_of('triton')}, transformers {all_of('transformers')}"
    dtypes = ", ".join(sorted({json.loads(row["settings"]).get("dtype", "bfloat16") for row in rows}))
    return (
        f"{all_of('device')}, {dtypes}, batch 1, text of {all_of('text')}, {versions}, "
        f"until {max(row['date'] for row in rows)}."
    )
