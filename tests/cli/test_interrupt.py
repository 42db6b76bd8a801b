"""Ctrl-C: exit code 130, and one line that says what is left and whether the command can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.runner import SMALL, run

from llama_surgery.learning import trainer


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def told(result: Any) -> str:
    assert result.exit_code == 130 and "Traceback" not in result.output, result.output
    lines = [line for line in result.stderr.splitlines() if "Interrupted" in line]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        (["operate", "MODEL", "--out", "OUT"], ": nothing was written."),
        (["evaluate", "MODEL", "--text", "TEXT", "--out", "OUT"], ": nothing was written."),
        (["learn", "MODEL", "--text", "TEXT", "--density", "0.2", "--out", "OUT"], ": nothing was written."),
        (["generate", "MODEL", "--prompt", "a"], "."),
    ],
)
def test_a_command_that_has_written_nothing_says_so(
    arguments: list[str],
    after: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[f"llama_surgery.cli.{arguments[0]}"], "load_model", interrupt)
    paths = {"MODEL": model, "TEXT": text, "OUT": tmp_path / "out"}
    assert told(run(*(paths.get(argument, argument) for argument in arguments))) == f"Interrupted{after}"
    assert not list(tmp_path.iterdir())


def test_learning_goes_on_after_an_interruption(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["learn", model, "--text", text, "--density", "0.2", "--out", tmp_path / "out", *SMALL]
    command += ["--length", "256", "--steps", "3", "--windows", "2", "--checkpoint-seconds", "0"]
    step, taken = trainer._step, iter(range(9))

    def second_is_interrupted(*arguments: Any) -> Any:
        if next(taken) == 1:
            interrupt()
        return step(*arguments)

    monkeypatch.setattr(trainer, "_step", second_is_interrupted)
    line = told(run(*command))
    assert "what is finished is kept in" in line and line.endswith("Run the same command again to go on.")
    assert run(*command).exit_code == 0
    assert next(taken) == 4  # one before, the interrupted one, and the two that were left


def test_what_can_go_on_says_so(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", model, "--text", text, "--length", "256", "--windows", "1", *SMALL]
    command += ["--continuations", "1", "--continuation-tokens", "4", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("llama_surgery.evaluation.long_generation.long_generation", interrupt)
        assert "what is finished is kept in" in told(run(*command))
    assert run(*command).exit_code == 0


def test_rows_that_are_written_already_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(shape: Any, config: Any, lengths: Any, density: Any, out: Path, **_: Any) -> None:
        out.write_text("rows")
        interrupt()

    monkeypatch.setattr("llama_surgery.bench.crossover.measure_crossover", measure)
    line = told(run("doctor", model, "--csv", tmp_path / "times.csv", "--device", "cpu"))
    assert line == f"Interrupted: written so far: {tmp_path / 'times.csv'}."


def test_of_several_processes_one_speaks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["llama_surgery.cli.operate"], "load_model", interrupt)
    monkeypatch.setenv("RANK", "1")
    result = run("operate", model, "--out", tmp_path / "out")
    assert result.exit_code == 130 and not result.stderr


def test_a_real_interrupt_has_no_traceback(demo_model_path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompt")  # a command that waits, before it has loaded anything
    command = ["generate", demo_model_path, "--prompt-file", tmp_path / "prompt"]
    running = subprocess.Popen(
        [sys.executable, "-m", "llama_surgery", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    descriptor = os.open(tmp_path / "prompt", os.O_WRONLY)  # returns when the command has opened its end
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    os.close(descriptor)
    assert running.returncode == 130
    assert errors.strip() == "Interrupted."
