"""``doctor``: the whole command on shapes small enough for a test."""

import csv
import json
from pathlib import Path

import pytest
from tests.cli.runner import SMALL, run

from llama_surgery.bench.crossover import Point, crossing, recommend
from llama_surgery.errors import SurgeryError
from llama_surgery.lengths import parse_length

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_explains_itself() -> None:
    result = run("doctor", "--help")
    assert result.exit_code == 0 and len(result.output) > 500


def test_what_cannot_be_measured_is_said_in_a_line(shapes: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["doctor", tmp_path / "none.json"], "no such folder or file"),
        (["doctor", shapes, "--adapter", tmp_path], "an adapter is a folder with"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output
    assert run("doctor", shapes, "--write").exit_code == 2


def test_the_doctor_tells_of_the_loss_that_thresholds_were_set_for(
    model: Path, text: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    given = ["--text", text, "--max-loss", "20%", "--length", "512", *SMALL]
    made = run("operate", model, "--out", adapter, *given, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)["measured_loss"]
    assert told["max_loss"] == 0.2 and told["high"] <= 0.2 and told["length"] == 512
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["measured_loss"] == told and saved["surgery"]["theta"] > 0.1
    given = ["--length", "256", "--device", "cpu", "--csv", tmp_path / "c.csv"]
    asked = run("doctor", model, "--adapter", adapter, *given)
    assert asked.exit_code == 0, asked.output
    assert "Loss: perplexity" in asked.stdout and "limit +20.00%" in asked.stdout


def test_the_doctor_recommends_and_writes(model: Path, text: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    made = run(
        "operate", model, "--out", adapter, "--text", text, "--density", "0.3", "--length", "512", *SMALL
    )
    assert made.exit_code == 0, made.output
    given = ["--length", "256", "--length", "512", "--device", "cpu", "--csv", tmp_path / "c.csv"]
    result = run("doctor", model, "--adapter", adapter, *given, "--density", "0.3", "--write", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert "2 of 2 layers can be operated, 4 query and 2 KV heads of 8" in found["Model"]
    assert found["Prefill"].startswith("plain PyTorch") and found["Decode"].endswith("they gain nothing")
    assert [p["length"] for p in found["points"]] == [256, 512] and found["dense_until"] % 16 == 0
    assert len(read(tmp_path / "c.csv")) == 2
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["surgery"]["dense_until"] == found["dense_until"]
    shown = run(
        "evaluate", model, "--adapter", adapter, "--text", text, "--length", "256", "--windows", "1", "--json"
    )
    assert json.loads(shown.stdout)["operated"][0]["config"]["dense_until"] == found["dense_until"]


def test_the_recommendation_weighs_stretches_and_not_whole_texts() -> None:
    def point(length: int, dense: float, operated: float) -> Point:
        return Point(length, dense, operated, dense)

    # Behind 1,000 each stretch is cheaper sparse, though the whole text is not until 4,000.
    points = [point(1000, 1, 3), point(2000, 4, 5), point(4000, 16, 9)]
    assert recommend(points, 1) == 1000
    assert recommend(points, 32) == 1024
    assert recommend([point(1000, 2, 1), point(2000, 8, 3)], 32) == 0
    assert recommend([point(1000, 1, 2), point(2000, 3, 6)], 32) == 2016


def test_where_the_costs_of_a_token_meet_is_said() -> None:
    def points(*operated: float) -> list[Point]:
        dense = (1, 4, 16)
        return [Point(1000 * d, d * d, o, 0) for d, o in zip(dense, operated, strict=True)]

    # Per thousand tokens: dense 5 at 2,500 and 20 at 10,000; operated 25 and 30.
    assert crossing(points(1, 76, 436)) == 18000
    assert crossing(points(1, 31, 391)) is None and crossing(points(1, 76, 436)[:2]) is None


def test_a_model_that_cannot_be_operated_is_told_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}), encoding="utf-8")
    result = run("doctor", tmp_path)
    assert result.exit_code == 1 and "Error:" in result.stderr and "Traceback" not in result.output


def test_lengths_are_read() -> None:
    assert parse_length("2k") == 2048 and parse_length("300") == 300
    for wrong in ("k", "", "-5", "0", "0k", "1.5k"):
        with pytest.raises(SurgeryError, match="tokens"):
            parse_length(wrong)
