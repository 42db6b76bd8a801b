"""``llama-surgery evaluate``: what it measures besides perplexity and plain needles."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.runner import SMALL, run
from transformers import AutoModelForCausalLM

from llama_surgery import SurgeryConfig
from llama_surgery.cli.tables import needle_table
from llama_surgery.surgery.adapter import write_adapter
from llama_surgery.topology.router import PageRouter

SQUAD = Path(__file__).resolve().parents[1] / "fixtures" / "ruler" / "squad.json"


@pytest.fixture(scope="module")
def given(model: Path, text: Path) -> list[str | Path]:
    return ["evaluate", model, "--text", text, "--length", "512", "--windows", "1", *SMALL]


def test_everything_at_once_is_in_the_tables_and_in_the_file(given: list[str | Path], tmp_path: Path) -> None:
    path = tmp_path / "out"
    harder = ["--needles", "4", "--needle-variant", "two-asked", "--needle-variant", "alike-names"]
    more = ["--continuations", "2", "--continuation-tokens", "8"]
    result = run(*given, *harder, *more, "--out", path)
    assert result.exit_code == 0, result.output
    for told in ("Needles by variant", "alike-names", "Agreement along the dense text"):
        assert told in result.stdout
    read = json.loads((path / "results.json").read_text(encoding="utf-8"))
    assert {needle["variant"] for needle in read["needles"]} == {"two-asked", "alike-names"}
    assert read["operated"][0]["divergence_by_position"][-1]["to"] == 512
    written = read["continuations"]["T = 16"]
    assert written["prompt_tokens"] == 504 and written["compared"] <= 16


def test_only_needles_that_the_dense_model_answers_are_compared() -> None:
    def needle(variant: str, kind: str, dense: bool, operated: bool) -> dict[str, Any]:
        right = {"dense": dense, "sparse": operated}
        return {"variant": variant, "kind": kind, "length": 512, "right": right}

    needles = [needle("one-fact", "number", False, operated) for operated in (True, False)]
    needles += [needle("four-facts", "word", number < 8, number < 6 or number == 8) for number in range(10)]
    table = needle_table({"operated": [{"name": "sparse"}], "needles": needles})
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in rows[:3]] == ["[bold]one-fact[/]", "  number", "  512 tokens"]
    assert rows[0][1:] == ("2", "0.0%", "50.0%", "–", "1")
    # Wilson's interval of 6 right of 8.
    assert rows[3] == ("[bold]four-facts[/]", "10", "80.0%", "70.0%", "-25.0 (-59.1 … -7.1)", "1")
    assert rows[4][1:] == rows[3][1:] and rows[4][0] == "  word"


def test_all_variants_can_be_asked_for(given: list[str | Path]) -> None:
    result = run(*given, "--needles", "5", "--needle-variant", "all", "--needle-length", "768", "--json")
    assert result.exit_code == 0, result.output
    variants = [needle["variant"] for needle in json.loads(result.stdout)["needles"]]
    assert len(set(variants)) == 5


def test_short_windows_and_texts_have_no_times_and_no_tree(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Short.", encoding="utf-8")
    (tmp_path / "b.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    few = ["--windows", "1", *SMALL, "--json", "--length"]
    found = [run("evaluate", model, "--text", tmp_path, *few, length) for length in ("20", "128")]
    short, long = (json.loads(result.stdout) for result in found)
    assert not short["decode_ms"] and set(long["decode_ms"]) == {"dense", "T = 16"}
    assert len(long["trees"]) == 1  # of the longest text
    (tmp_path / "b.txt").write_text(text.read_text(encoding="utf-8")[:120], encoding="utf-8")
    assert json.loads(run("evaluate", model, "--text", tmp_path, *few, "20").stdout)["trees"] == []


def test_wrong_extras_are_refused(given: list[str | Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*given, "--needle-variant", "all").exit_code == 2
    unknown = run(*given, "--needles", "1", "--needle-variant", "fifty")
    assert unknown.exit_code == 1 and "sixteen-facts" in unknown.stderr
    monkeypatch.setattr("llama_surgery.cli.evaluate_parts.evaluate", None)  # nothing is measured before
    long = run(*given, "--continuations", "1", "--continuation-tokens", "512")
    assert long.exit_code == 1 and "512 new tokens of 512" in long.stderr


def test_what_is_finished_is_kept_and_read_again(
    given: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*given, "--needles", "1", "--continuations", "1"]
    command += ["--continuation-tokens", "4", "--out", tmp_path / "out", "--json"]
    first = run(*command)
    assert first.exit_code == 0, first.output
    for part in ("evaluate", "long_generation"):
        monkeypatch.setattr(f"llama_surgery.cli.evaluate_parts.{part}", None)
    assert json.loads(run(*command).stdout) == json.loads(first.stdout)
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["dense", "T = 16"]
    assert isinstance(run(*command, "--seed", "1").exception, TypeError)  # has to be measured
    assert isinstance(run(*command, "--tf32").exception, TypeError)
    torch.set_float32_matmul_precision("highest")
    other = shutil.copytree(given[1], tmp_path / "other" / Path(given[1]).name)  # the same name
    trained = AutoModelForCausalLM.from_pretrained(other)
    trained.model.layers[0].mlp.up_proj.weight.data += 1
    trained.save_pretrained(other)
    assert isinstance(run("evaluate", other, *command[2:]).exception, TypeError)


def test_thresholds_are_set_on_what_is_then_not_measured_on(
    model: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    whole = (demo_model_path.parent / "text" / "calibration.txt").read_text(encoding="utf-8")
    text.write_text(whole[:16_000], encoding="utf-8")
    command = ["evaluate", model, "--text", text, "--density", "0.3", "--length", "256", *SMALL, "--json"]
    result = run(*command, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["conditions"]["thresholds"].startswith("set on the first quarter of each document")
    assert 0.2 < found["operated"][0]["density"]["far_density"] <= 0.32
    assert len(list((tmp_path / "out" / "kept").glob("thresholds-*.json"))) == 1


def test_a_gate_goes_by_limits(given: list[str | Path], tmp_path: Path) -> None:
    limits = tmp_path / "limits.json"
    command = [*given, "--windows", "2", "--needles", "2", "--out", tmp_path / "out", "--gate", limits]
    for content, code, told in (
        ({"needles": 1}, 0, "Kept: "),
        ({"needles": 1, "perplexity": 100}, 3, "2, too few"),
        ({"needles": 1, "ruler": 0.5}, 3, "not measured"),
    ):
        limits.write_text(json.dumps(content), encoding="utf-8")
        result = run(*command)
        assert result.exit_code == code and told in result.stdout, result.output
    limits.write_text('{"speed": 1}', encoding="utf-8")
    wrong = run(*command)
    assert wrong.exit_code == 1 and "ruler_single" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--text, --ruler or --lm-eval"),
        (["--ruler", "--needles", "2"], "--needles: give --text too"),
        (["--ruler", "--density", "0.2"], "--density: give --text too"),
        (["--text", "TEXT", "--calibration-text", "TEXT"], "--density or --against"),
        (["--text", "TEXT", "--against", "all", "--density", "0.2"], "leave --density"),
        (["--text", "TEXT", "--against", "all", "--gate", "TEXT"], "--gate"),
        (["--text", "TEXT", "--against", "all", "--needles", "0"], "--needles of 1 or more"),
        (["--text", "TEXT", "--against", "all", "--adapter", "TEXT", "--ruler"], "two commands"),
        (
            ["--text", "TEXT", "--adapter", "TEXT", "--theta", "0.1", "--tile", "64"],
            "--tile, --theta: --adapter",
        ),
        (["--text", "TEXT", "--adapter", "TEXT", "--also-tile", "1"], "--also-tile: --adapter"),
        (["--text", "TEXT", "--decode-density", "0.1"], "--decode-density: give --density too"),
        (["--text", "TEXT", "--needle-length", "512"], "--needle-length: give --needles too"),
        (["--text", "TEXT", "--continuation-tokens", "8"], "give --continuations too"),
        (["--text", "TEXT", "--ruler-samples", "100"], "--ruler-samples: give --ruler too"),
        (
            ["--text", "TEXT", "--topology", "gumbel", "--page-size", "64"],
            "--page-size: only --topology pages",
        ),
    ],
)
def test_what_does_not_go_together(arguments: list[str], told: str, model: Path, text: Path) -> None:
    result = run("evaluate", model, *(text if a == "TEXT" else a for a in arguments))
    assert result.exit_code == 2 and told in " ".join(result.stderr.split()), result.output


class TestRuler:
    """``--ruler``."""

    @pytest.fixture
    def ruler(self, model: Path) -> list[str | Path]:
        few = ["--ruler-length", "640,1k", "--ruler-samples", "2", "--ruler-task", "vt,fwe", "--batch", "2"]
        return ["evaluate", model, "--ruler", *few]

    def test_tables_and_files_of_an_adapter_with_everything_open(
        self, ruler: list[str | Path], model: Path, tmp_path: Path
    ) -> None:
        adapter, out = tmp_path / "full", tmp_path / "out"
        made = run("operate", model, "--out", adapter, *SMALL, "--theta", "0", "--theta-decode", "0")
        assert made.exit_code == 0, made.output
        result = run(*ruler, "--adapter", adapter, "--out", out)
        assert result.exit_code == 0, result.output
        for told in ("RULER at 640 tokens", "RULER at all lengths", "worst task", "100.0%"):
            assert told in result.stdout
        read = json.loads((out / "results.json").read_text(encoding="utf-8"))["ruler"]
        assert read["complete"] and read["settings"]["lengths"] == [640, 1024]
        drawn = run("report", out / "results.json", "--out", tmp_path / "page.html")
        assert drawn.exit_code == 1 and "evaluate --text" in drawn.stderr
        answers = {(c["name"], c["task"], c["length"]): c["answers"] for c in read["cells"]}
        for task, length in (("vt", 640), ("fwe", 640), ("vt", 1024), ("fwe", 1024)):
            assert answers["T = 16", task, length] == answers["dense", task, length]
        assert len((out / "ruler.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 2 * 2
        again = run(*ruler, "--adapter", adapter, "--out", out, "--seconds", "0", "--json")
        assert json.loads(again.stdout)["ruler"] == read  # nothing had to be begun
        more = run(*ruler, "--adapter", adapter, "--out", out, "--seconds", "0", "--seed", "1")
        assert more.exit_code == 0 and "Not everything is finished" in more.stderr

    def test_own_haystack_and_questions(self, model: Path, text: Path) -> None:
        given = ["--ruler-length", "1k", "--ruler-samples", "1", "--ruler-task", "niah_single_2,qa_1"]
        result = run("evaluate", model, "--ruler", *given, "--haystack", text, "--qa-1", SQUAD, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["ruler"]
        assert found["settings"]["tasks"] == ["niah_single_2", "qa_1"] and found["complete"]

    def test_what_is_wrong_is_said(self, model: Path, tmp_path: Path) -> None:
        # All tasks without a file are meant, and the common words need more room than this.
        short = run("evaluate", model, "--ruler", "--ruler-length", "700")
        assert short.exit_code == 1 and "cwe does not fit into 700 tokens" in short.stderr
        assert "Left out: qa_1, qa_2" in short.stderr
        for arguments, told in (
            (["--ruler-task", "vtt"], "task 'vtt'"),
            (["--ruler-length", "8q"], "length '8q'"),
            (["--ruler-length", "8k"], "was made for 1024"),
            (["--qa-1", tmp_path / "nowhere.json"], "cannot be read"),
            (["--ruler-task", "qa_2"], "qa_2 needs a question file"),
            (["--chat"], "no chat template"),
        ):
            few = ["--length", "64", "--ruler-task", "vt", "--ruler-length", "1k"]
            result = run("evaluate", model, "--ruler", *few, *arguments)
            assert result.exit_code == 1 and told in result.stderr, result.output


class TestAgainst:
    """``--against``."""

    @pytest.fixture
    def against(self, model: Path, text: Path, tmp_path: Path) -> list[str | Path]:
        small = ["--length", "256", "--windows", "1", "--needles", "2", "--needle-length", "256"]
        small += ["--needle-variant", "one-fact", "--total-density", "0.7", *SMALL]
        given = ["evaluate", model, "--text", text, "--calibration-text", text, "--out", tmp_path / "out"]
        return [*given, *small]

    def test_tables_figure_and_going_on(self, against: list[str | Path], tmp_path: Path) -> None:
        done = run(*against, "--against", "streaming")
        assert done.exit_code == 0, done.output
        for told in ("sink + window (StreamingLLM)", "needles kept", "Written: "):
            assert told in done.stdout
        results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["against"]
        forms = [row["form"] for row in results["rows"]]
        assert forms[0] == "dense" and set(forms[1:]) == {"streaming"} and len(forms) >= 6
        with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
            assert [row["form"] for row in csv.DictReader(file)] == forms
        assert (tmp_path / "out" / "comparison.svg").read_text(encoding="utf-8").startswith("<svg")
        merged = run(*against, "--against", "streaming", "--seconds", "0", "--json")
        assert merged.exit_code == 0 and json.loads(merged.stdout)["against"] == results
        later = run(*against, "--against", "streaming,quest", "--seconds", "0")
        assert later.exit_code == 0 and "run the command again to go on" in later.stderr

    def test_an_adapter_is_compared(self, against: list[str | Path], model: Path, tmp_path: Path) -> None:
        adapter = tmp_path / "adapter"
        config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, summary="page")
        routers = {1: PageRouter(offset=torch.tensor([[0.2, -0.2], [0.1, -0.1]]))}
        write_adapter(adapter, AutoModelForCausalLM.from_pretrained(model), config, routers)
        refused = run(*against, "--against", "learned")
        assert refused.exit_code == 1 and "needs an adapter" in refused.stderr
        done = run(*against, "--against", "learned", "--adapter", adapter)
        assert done.exit_code == 0, done.output
        assert "pages, tile 16, learned (this package)" in done.stdout
        with open(tmp_path / "out" / "comparison.csv", encoding="utf-8") as file:
            dense, *learned = csv.DictReader(file)
        assert float(dense["total_density"]) == 1 and learned[-1]["target_density"] == "1.0"
        assert all(f"{float(row['total_density']):.1%}" in done.stdout for row in learned)

    def test_wrong_rules_are_refused(self, against: list[str | Path]) -> None:
        wrong = run(*against, "--against", "nonsense")
        assert wrong.exit_code == 1 and "there are dense, pages" in wrong.stderr
        nothing = run(*against, "--against", "dense", "--seconds", "0")
        assert nothing.exit_code == 1 and "is not measured yet" in nothing.stderr


def test_a_local_task_of_the_harness_runs_in_one_line(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    document = {"context": "Once upon a", "choices": ["time", "seven"], "answer": 0}
    data.write_text(json.dumps(document) + "\n", encoding="utf-8")
    # JSON is YAML.
    task = {
        "task": "surgery_small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "small.yaml").write_text(json.dumps(task), encoding="utf-8")
    out = tmp_path / "new" / "out"
    given = ["--lm-eval", "surgery_small", "--lm-eval-include", tmp_path, "--out", out]
    result = run("evaluate", model, *given)
    assert result.exit_code == 0, result.output
    assert "surgery_small" in result.stdout and "acc" in result.stdout
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))["lm_eval"]
    ((row, *_),) = (one["rows"] for one in found.values())
    assert row["dense"] == row["operated"]
    run("evaluate", model, *given)
    (tmp_path / "small.yaml").write_text(
        json.dumps({**task, "doc_to_text": "So {{context}}"}), encoding="utf-8"
    )
    run("evaluate", model, *given)
    assert len(list((out / "kept").glob("lm-eval-*"))) == 2
    unknown = run(
        "evaluate", model, "--ruler", "--ruler-length", "1k", "--ruler-task", "vt", "--lm-eval", "nowhere"
    )
    assert unknown.exit_code == 1 and "no such tasks" in unknown.stderr and "vt" not in unknown.stderr
