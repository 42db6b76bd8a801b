"""benchmarks/real_speed.py: times of a real checkpoint, beside what the same settings lose."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.conftest import ROOT
from transformers import AutoModelForCausalLM

SMALL = ["chunk_size=64", "page_size=16", "window=32", "tile=16"]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_speed  # type: ignore[import-not-found]

    return real_speed


@pytest.fixture
def table(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The table's module, which reads both CSV files in the test's folder."""
    import real_speed_table  # type: ignore[import-not-found]

    monkeypatch.setattr(real_speed_table, "FILE", tmp_path / "speed.csv")
    monkeypatch.setattr(real_speed_table, "RESULTS", tmp_path)
    return real_speed_table


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def quality(file: Path, **changed: Any) -> dict[str, str]:
    row = {
        **{"model": "m", "length": "640", "text": "books", "form": "operated", "settings": "{}"},
        **{"far_density": "0.05", "total_density": "0.4", "ratio": "1.01", "ratio_low": "1.0"},
        **{"ratio_high": "1.02", "needles_kept": "0.9", "ruler_dense": "", "ruler": "", "date": "2026-01-01"},
        **changed,
    }
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, row)
        writer.writeheader()
        writer.writerow(row)
    return row


def test_a_model_is_timed_and_a_second_run_goes_on(
    speed: ModuleType,
    table: ModuleType,
    model: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known, file = tmp_path / "real_quality.csv", tmp_path / "speed.csv"
    settings = json.dumps(
        {name: int(value) for name, value in (field.split("=") for field in SMALL)}
        | {"decode": "dense", "dtype": "float32", "budgets": "other", "theta": 0.3}
    )
    quality(known, model=model.name, settings=settings, far_density="0.21")
    given = ["--text", texts, "--device", "cpu", "--dtype", "float32", "--set", *SMALL, "--density", "0.2"]
    given += ["--dense-until", "0"]
    kept = ["--kept", tmp_path / "kept", "--quality", known, "--out", file]

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", list(map(str, ["real_speed.py", model, *given, *kept, *arguments])))
        return speed.main()

    assert run("--lengths", "640", "2k") == 0
    told = capsys.readouterr().out
    assert "2,048 tokens are left out" in told and "everything open, logits differ" in told
    first = rows(file)
    assert [row["part"] for row in first] == ["first token", "decode step"]
    assert list(first[0]) == list(table.COLUMNS)
    for row in first:
        assert float(row["speedup"]) == pytest.approx(float(row["rival_ms"]) / float(row["ms"]), rel=1e-3)
        assert int(row["alternations"]) >= 5 and row["device"] and row["torch"] and row["date"]
        assert (row["quality_length"], row["ratio_quality"], row["quality_settings"]) == (
            "640",
            "1.01",
            settings,
        )
    assert 0 < float(first[0]["far_density"]) < 0.3 and float(first[0]["total_density"]) < 0.9
    assert float(first[1]["total_density"]) == pytest.approx(1.0)  # decode steps read everything
    assert json.loads(first[0]["settings"])["budgets"]
    # A longer list adds to what is there, and nothing is measured twice.
    assert run("--lengths", "640", "320") == 0
    added = rows(file)
    assert [row["length"] for row in added] == ["320", "320", "640", "640"] and added[2:] == first
    assert "640 tokens, first token" not in capsys.readouterr().out
    assert run("--lengths", "640", "--again", "--seconds", "0") == 0
    assert rows(file) == added and "the check is not run" in capsys.readouterr().out
    # One row a model, of the longest prompt whose quality is known.
    (line,) = table.lost_and_won().splitlines()[2:3]
    assert line.startswith(f"| {model.name} | 640 | ") and "| 1.0100 (1.0000 … 1.0200) | 90.0% | – |" in line
    assert table.real_speed().count("| first token |") == 2


def test_tables_without_times_say_so(table: ModuleType, tmp_path: Path) -> None:
    quality(tmp_path / "real_quality.csv")
    assert table.lost_and_won() == table.real_speed() == "Not measured yet."
    (tmp_path / "speed.csv").write_text(",".join(table.COLUMNS) + "\n", encoding="utf-8")
    assert table.lost_and_won() == table.real_speed() == "Not measured yet."


def test_quality_of_the_same_settings_alone(table: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    own = {"decode": "dense", "theta": 0.1}
    row = quality(file, settings=json.dumps(own), length="8192")

    def found(settings: dict[str, Any], length: int, density: float | None, *given: dict[str, str]) -> Any:
        return table.quality_of(given or (row,), "m", length, "books", settings, density)

    assert found(own, 1024, None) == row
    assert found({**own, "theta": 0.2}, 8192, None) is None  # another θ by hand
    assert found({**own, "theta": 0.2, "budgets": "b"}, 8192, 0.06) == row  # calibrated to about as much
    assert found({**own, "theta": 0.2}, 8192, 0.03) is None
    assert found({**own, "page_size": 64}, 8192, 0.05) is None
    longer, same = {**row, "length": "32768"}, {**row, "length": "1024"}
    assert found(own, 1024, None, row, longer, same) == same
    assert found(own, 2048, None, row, longer, same) == longer
    assert found(own, 2048, None, {**row, "text": "code"}, {**row, "form": "tokens"}) is None


def test_a_twin_has_the_same_weights_and_a_configuration_of_its_own(speed: ModuleType, model: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    other = speed.twin(llm)
    for one, two in zip(llm.parameters(), other.parameters(), strict=True):
        assert one is two
    assert llm.config is not other.config and llm.model.layers[0] is not other.model.layers[0]
