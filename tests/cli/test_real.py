"""benchmarks/real.py: quality of a real checkpoint, in runs that add up."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.json_lines import append_line, read_lines
from tests.conftest import ROOT
from transformers import AutoModelForCausalLM

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import TextError

SMALL = ["chunk_size=64", "page_size=16", "window=32", "tile=16"]
FEW = ["--length", "640", "--task", "vt", "--batch", "2"]
FEW += ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real  # type: ignore[import-not-found]

    return real


@pytest.fixture
def run(real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with its results in the test's folder."""

    def run(*arguments: str | Path) -> int:
        kept = ["--out", tmp_path / "out", "--csv", tmp_path / "real.csv"]
        monkeypatch.setattr(sys, "argv", ["real.py", *map(str, [*arguments, *kept])])
        return real.main()

    return run


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "real.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_runs_add_up(run: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    given = [model, "--text", texts, *FEW, "--set", *SMALL, "--density", "0.2", "--rounding", "eager"]
    assert run(*given, "--windows", "1", "--needles", "1", "--ruler-samples", "0", "--prepare") == 0
    (study,) = (tmp_path / "out").iterdir()
    assert not (tmp_path / "real.csv").exists() and (study / "samples" / "needles-0.json").exists()
    assert run(*given, "--windows", "1", "--needles", "1", "--ruler-samples", "0") == 0
    before = {file.name: file.read_text() for file in study.glob("*.jsonl")}
    first = rows(tmp_path)
    assert (
        run(*given, "--windows", "2", "--needles", "3", "--ruler-samples", "1", "--form", "dense", "operated")
        == 0
    )
    for name, content in before.items():
        now = (study / name).read_text()
        assert now.startswith(content) and (len(now) > len(content)) == (
            name in ("dense.jsonl", "operated.jsonl")
        )
    lines = read_lines(study / "operated.jsonl")
    items = [line["item"] for line in lines if "item" in line]
    # Windows are the same for both ways to decode.
    assert sorted(items) == sorted(
        ["window 0", "window 1"] + 2 * ["needle 0", "needle 1", "needle 2", "ruler vt 0"]
    )
    found = rows(tmp_path)
    assert [row["form"] for row in found] == ["dense", "rounding", "operated", "operated", "tokens", "blocks"]
    assert [row["windows"] for row in found] == ["2", "1", "2", "2", "1", "1"]
    assert found[1] == first[1] and found[4:] == first[4:]
    assert ",".join(found[0]) == (
        "model,length,text,form,settings,far_density,total_density,ratio,ratio_low,ratio_high,needles_dense,"
        "needles_kept,ruler_dense,ruler,worst_task,worst_change,windows,samples,seed,device,date"
    )
    sparse, dense = (json.loads(row["settings"]) for row in (found[3], found[2]))
    assert sparse.pop("decode") == "sparse" and dense.pop("decode") == "dense"
    assert sparse.pop("theta_decode") > 0 and "theta_decode" not in dense and sparse == dense
    assert sparse["budgets"]  # of heads
    assert {name: sparse[name] for name in ("chunk_size", "page_size", "window", "tile")} == {
        **{"chunk_size": 64, "page_size": 16, "window": 32, "tile": 16}
    }
    assert 0 < float(found[2]["far_density"]) < 0.25 and float(found[2]["total_density"]) < 0.9
    counted = json.loads((study / "calibrated.json").read_text()).values()
    wanted = next(iter(counted))["total"]  # on calibration text, as the oracles' budgets are
    for row, near in zip(found[4:], (0.003, 0.1), strict=True):  # keys; blocks of 64 of 640 tokens
        assert abs(float(row["total_density"]) - wanted) < near
    assert found[1]["ratio"] and abs(float(found[1]["ratio"]) - 1) < 1e-3
    # Beside it the model with one threshold for all heads.
    assert run(*given, "--windows", "1", "--needles", "0", "--ruler-samples", "0", "--form", "one-theta") == 0
    single = [json.loads(row["settings"]) for row in rows(tmp_path) if row["form"] == "one-theta"]
    assert len(single) == 2 and not any("budgets" in settings for settings in single)
    # The same command once more measures nothing; another text in the same place is refused.
    state = {file: file.read_bytes() for file in study.glob("*.json*")}
    assert run(*given, "--windows", "1", "--needles", "1", "--ruler-samples", "0") == 0
    assert {file: file.read_bytes() for file in study.glob("*.json*")} == state
    assert run(*given, "--seed", "1") == 1


def test_nothing_is_begun_after_the_deadline(run: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    assert run(model, "--text", texts, *FEW, "--deadline", "0", "--windows", "1", "--needles", "0") == 0
    (study,) = (path for path in (tmp_path / "out").iterdir() if path.name != "claims")
    assert [file.name for file in study.glob("*.json*")] == ["study.json"]
    assert not (tmp_path / "real.csv").exists()


def study_of(results: ModuleType, folder: Path, **changed: Any) -> Any:
    settings = {"model": "m", "length": 8192, "text": "t", "seed": 0, **changed}
    study = results.Results(folder, settings)
    study.begin("dense", {})
    study.begin("operated", {"decode": "dense", "theta": 0.1})
    return study


def test_the_table_and_the_targets(
    real: ModuleType, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import real_results  # type: ignore[import-not-found]

    study = study_of(real_results, tmp_path / "out" / "study")
    operated = {"decode": "dense", "theta": 0.1}
    about = {"device": "here"}
    for number in range(4):
        study.add("dense", {}, f"window {number}", {"loss": 2.0, **about})
        lost = {"loss": 2.0 + 0.02 * (number % 2), "far": 0.05, "total": 0.2, **about}
        study.add("operated", operated, f"window {number}", lost)
    study.add("dense", {}, "window 4", {"loss": 9.0, **about})  # not paired: does not count
    for number in range(200):
        study.add("dense", {}, f"needle {number}", {"right": number < 100, **about})
        study.add("operated", operated, f"needle {number}", {"right": 1 <= number <= 101, **about})
    for number in range(10):
        for task, dense, own in (("vt", 1.0, 0.9), ("cwe", 0.5, 0.5), ("fwe", 0.1, 0.0)):
            study.add("dense", {}, f"ruler {task} {number}", {"score": dense, "answer": "", **about})
            study.add("operated", operated, f"ruler {task} {number}", {"score": own, "answer": "", **about})
    # A process that was killed, and another that measured an item twice.
    (tmp_path / "out" / "study" / "operated.jsonl").open("a").write('{"key": "cut')
    study.add("operated", operated, "needle 0", {"right": True, **about})
    assert run("--table") == 0
    row = rows(tmp_path)[1]
    assert float(row["ratio"]) == pytest.approx(2.718281828**0.01, abs=1e-6)
    assert (row["windows"], row["samples"], row["far_density"], row["total_density"]) == (
        "4",
        "20",
        "0.05",
        "0.2",
    )
    assert (row["needles_dense"], row["needles_kept"]) == ("0.5", "0.99")
    assert (row["ruler_dense"], row["ruler"], row["worst_task"]) == ("75.0", "70.0", "vt")
    assert float(row["worst_change"]) == pytest.approx(-10) and row["device"] == "here"
    assert "dense 100 of 200, kept 99, gained 2" in capsys.readouterr().out
    assert run("--check") == 1
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told == ["MISSED", "met", "MISSED", "met", "MISSED"]
    # Models with learned corrections together: here one, which loses a tenth of one of two tasks.
    learned = {"decode": "dense", "theta": 0.2, "learned": ["summary"]}
    study.begin("operated", learned)
    study.add("operated", learned, "window 0", {"loss": 2.0, "far": 0.05, "total": 0.2, **about})
    for number in range(10):
        for task, own in (("vt", 0.9), ("cwe", 0.5)):
            study.add("operated", learned, f"ruler {task} {number}", {"score": own, "answer": "", **about})
    assert run("--check") == 1
    assert "together, learned: -5.0 points" in capsys.readouterr().out.splitlines()[-1]
    # What nobody measured is not met.
    shutil.rmtree(tmp_path / "out")
    study_of(real_results, tmp_path / "out" / "study", length=5000)
    assert run("--check") == 1
    assert capsys.readouterr().out.count("not measured") == 4


def test_rows_of_other_studies_stay(real: ModuleType, tmp_path: Path) -> None:
    import real_table  # type: ignore[import-not-found]

    def row(**changed: Any) -> dict[str, Any]:
        return dict.fromkeys(real_table.COLUMNS, 0) | {"model": "m", "text": "t", "form": "dense"} | changed

    file = tmp_path / "real.csv"
    real_table.update(file, [row(length=16384, form="operated"), row(length=8192)])
    real_table.update(file, [row(length=16384, ratio=2), row(length=8192, windows=5)])
    kept = [(r["length"], r["form"], r["ratio"], r["windows"]) for r in rows(tmp_path)]
    assert kept == [
        ("8192", "dense", "0", "5"),
        ("16384", "dense", "2", "0"),
        ("16384", "operated", "0", "0"),
    ]


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"attention": "eager"}])
def test_another_rounding_is_taken_back(real: ModuleType, model: Path, settings: dict[str, str]) -> None:
    from real_forms import Rounding  # type: ignore[import-not-found]

    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.arange(5, 60)[None]
    before = llm(ids).logits
    with Rounding(llm, settings).running():
        other = llm(ids).logits
    assert torch.equal(llm(ids).logits, before) and llm.config._attn_implementation == "sdpa"
    assert other.dtype == getattr(torch, settings.get("dtype", "float32"))
    assert 0 < (other.float() - before).abs().max() < 0.1


def test_what_settings_say_of_a_configuration(real: ModuleType) -> None:
    from real_forms import by_decode, changes

    assert changes(SurgeryConfig()) == changes(SurgeryConfig(theta=0.1)) == {}
    assert changes(SurgeryConfig(page_size=64)) == {"page_size": 64}
    both = SurgeryConfig(theta=0.1, theta_decode=0.02)
    assert by_decode(both) == {"dense": SurgeryConfig(theta=0.1, theta_decode=0.0), "sparse": both}
    assert list(by_decode(SurgeryConfig(theta=0.1, theta_decode=0.0))) == ["dense"]
    assert list(by_decode(SurgeryConfig(tile=1, theta=0.1))) == ["sparse"]
    assert list(by_decode(SurgeryConfig(tile=1, theta=0))) == ["dense"]


def test_budgets_of_oracles(real: ModuleType) -> None:
    from real_forms import budget

    assert budget("tokens", 1.0, 100) == 100 and budget("blocks", 1.0, 130) == 3
    assert budget("tokens", 0.0, 100) == budget("blocks", 0.0, 130) == 1
    # Rows 0 … 99 read 10 keys, the first of them fewer: 955 of 5,050 pairs.
    assert budget("tokens", 955 / 5050, 100) == budget("tokens", 990 / 5050, 100) == 10
    # Rows of 4 blocks read their own part and one block before: 4 · 2,080 + 3 · 64² of 32,896 pairs.
    assert budget("blocks", 20608 / 32896, 256) == 2


def test_every_other_document_is_for_calibration(real: ModuleType, tmp_path: Path) -> None:
    from real_samples import split  # type: ignore[import-not-found]

    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    assert split(tmp_path, None) == (["a", "c"], ["b"])
    assert split(tmp_path, tmp_path / "b.txt") == (["b"], ["a", "b", "c"])
    with pytest.raises(TextError, match="--calibration-text"):
        split(tmp_path / "a.txt", None)


def test_an_unknown_field_or_a_missing_model_is_told_in_a_line(
    run: Any, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--text", texts, *FEW, "--set", "pages=3") == 1
    assert "--set pages: fields of SurgeryConfig are topology," in capsys.readouterr().err
    assert run(tmp_path / "none.gguf", "--text", texts, *FEW) == 1
    assert "no such" in capsys.readouterr().err
    append_line(tmp_path / "x", 1)
    assert run(tmp_path / "x", "--text", texts, *FEW) == 1
