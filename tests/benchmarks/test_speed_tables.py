"""Tables of times of the present defaults, made of a CSV that need not be there."""

import csv
from pathlib import Path
from types import ModuleType

import pytest
from tests.conftest import ROOT


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import csv_tables  # type: ignore[import-not-found]
    import speed_tables  # type: ignore[import-not-found]

    for module in (csv_tables, speed_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return speed_tables


def test_attention_of_the_defaults(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.attention() == tables.attention_parts() == "Not measured yet."
    shape = {"n": "32768", "heads": "28", "kv_heads": "4"}
    about = {"device": "H200", "dtype": "bfloat16", "torch": "2", "triton": "3", "date": "2026-11-30"}
    setting = {"page": "32", "tile": "64", "far": "0.05"}
    whole = {"part": tables.WHOLE, "p50_ms": "2", "executed_far": "0.0502", "total_density": "0.0934"}
    rows = [
        {**shape, "part": "cuDNN", "p50_ms": "14"},
        {**shape, **setting, "part": "layout", "p50_ms": "0.3"},
        {**shape, **setting, **whole, "over_cuDNN": "7", "over_FlashAttention-2": "12.04"},
    ]
    with (tmp_path / "attention.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) + list(about))
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    found = tables.attention().splitlines()[2]
    assert found == "| 32,768 | 28 / 4 | 0.050 | 0.093 | 2 | 7.0 × | 12.0 × |"
    assert tables.attention_parts().splitlines()[2] == "| layout | 0.3 |"


def test_rows_with_more_columns_join_those_that_are_there(tables: ModuleType, tmp_path: Path) -> None:
    import csv_tables  # type: ignore[import-not-found]

    file = tmp_path / "rows.csv"
    for row in (
        {"seed": 0, "loss": 1},
        {"seed": 0, "loss": 2, "model": "m"},
        {"seed": 0, "loss": 3, "model": "m"},
    ):
        csv_tables.merge(file, [row], None, ("model", "seed"))
    assert [(row["model"], row["loss"]) for row in csv_tables.rows_of(file)] == [("", "1"), ("m", "3")]
