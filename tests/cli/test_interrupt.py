"""Ctrl-C: exit code 130, and one line that says what is left and whether the command can go on.

Before that: a first line of output within three seconds.
"""

import functools
import importlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.cli.runner import SMALL, run

from llama_surgery.cli.console import status
from llama_surgery.learning import trainer


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT, and what they start too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def told(result: Any) -> str:
    assert result.exit_code == 130 and "Traceback" not in result.output, result.output
    lines = [line for line in result.stderr.splitlines() if "Interrupted" in line]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0])
    return lines[0]


SHORT = ["--length", "256", "--windows", "1", *SMALL]
TEXT = ["MODEL", "--text", "TEXT"]
#: Commands by name.
COMMANDS: dict[str, list[str]] = {
    "operate": [*TEXT, "--density", "0.2", "--length", "256", "--out", "OUT", *SMALL],
    "learn": [*TEXT, "--density", "0.2", "--steps", "2", "--checkpoint-seconds", "0", "--out", "OUT", *SHORT],
    "learn, streamed": [
        *(*TEXT, "--density", "0.2", "--steps", "2", "--checkpoint-seconds", "0", "--out", "OUT", *SHORT),
        "--stream",
    ],
    "learn, gumbel": [
        *(*TEXT, "--topology", "gumbel", "--gumbel-radius", "1", "--gumbel-window", "16"),
        *(
            "--gumbel-length",
            "256",
            "--gumbel-arities",
            "3",
            "--length",
            "128",
            "--windows",
            "3",
            "--steps",
            "3",
        ),
        *("--checkpoint-seconds", "0", "--out", "OUT"),
    ],
    "evaluate": [*TEXT, "--out", "OUT", *SHORT],
    "evaluate, long texts": [
        *(*TEXT, "--out", "OUT", *SHORT, "--continuations", "1", "--continuation-tokens", "8"),
    ],
    "evaluate, ruler": [
        *("MODEL", "--ruler", "--ruler-length", "512", "--ruler-samples", "2", "--out", "OUT", *SMALL),
        *("--ruler-task", "niah_single_1"),
    ],
    "evaluate, against": [
        *(*TEXT, "--calibration-text", "TEXT", "--against", "streaming", "--needle-variant", "one-fact"),
        *("--needles", "1", "--needle-length", "256", "--total-density", "0.5", "--out", "OUT", *SHORT),
    ],
    "export": ["MODEL", "OUT"],
    "export-topology": [*TEXT, "--out", "OUT.npz", "--length", "256"],
    "report": ["RESULTS", "--out", "OUT.html"],
    "doctor": ["MODEL", "--device", "cpu"],
    "demo": ["--small", "--out", "OUT"],
    "plan": ["MODEL", "--length", "512"],
    "generate": ["MODEL", "--prompt-file", "TEXT", "--max-new-tokens", "3"],
}
LOADING = "llama_surgery.checkpoint:located"
FORWARD = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"
WRITING = "os:fsync"  # a file is filled and not yet in its place
NOTHING, GOES_ON, SOME, READS = (
    ": nothing was written.",
    "Run the same command again to go on.",
    ": written so far: ",
    ".",  # of a command that writes no file
)
#: What is interrupted where (a function and the number of its call), and what is said of it.
POINTS = [
    ("operate", LOADING, 1, NOTHING),
    ("operate", FORWARD, 3, NOTHING),
    ("operate", WRITING, 2, NOTHING),
    ("learn", LOADING, 1, NOTHING),
    ("learn", "llama_surgery.learning.trainer:_step", 2, GOES_ON),
    ("learn", "llama_surgery.surgery.adapter:save_adapter", 1, GOES_ON),
    ("learn, streamed", LOADING, 1, NOTHING),
    ("learn, streamed", WRITING, 4, GOES_ON),
    ("learn, streamed", "llama_surgery.surgery.adapter:write_adapter", 1, GOES_ON),
    ("learn, gumbel", LOADING, 1, NOTHING),
    ("learn, gumbel", WRITING, 2, GOES_ON),
    ("learn, gumbel", "llama_surgery.surgery.adapter:save_adapter", 1, GOES_ON),
    ("evaluate", LOADING, 1, NOTHING),
    ("evaluate", FORWARD, 2, NOTHING),
    ("evaluate", WRITING, 1, NOTHING),
    ("evaluate, long texts", LOADING, 1, NOTHING),
    ("evaluate, long texts", "llama_surgery.cli.evaluate_parts:long_generation", 1, GOES_ON),
    ("evaluate, long texts", "llama_surgery.cli.evaluate_parts:write_json", 1, GOES_ON),
    ("evaluate, ruler", LOADING, 1, NOTHING),
    ("evaluate, ruler", WRITING, 2, GOES_ON),
    ("evaluate, ruler", "llama_surgery.cli.evaluate_parts:write_json", 1, GOES_ON),
    ("evaluate, against", LOADING, 1, NOTHING),
    ("evaluate, against", WRITING, 2, GOES_ON),
    ("evaluate, against", "llama_surgery.cli.evaluate_parts:comparison", 1, GOES_ON),
    ("export", "llama_surgery.serving.export:exported_architecture", 1, NOTHING),
    ("export", "shutil:copyfile", 2, NOTHING),
    ("export", WRITING, 1, NOTHING),
    ("export-topology", LOADING, 1, NOTHING),
    ("export-topology", FORWARD, 1, NOTHING),
    ("export-topology", WRITING, 1, NOTHING),
    ("report", "llama_surgery.report.results:read_results", 1, NOTHING),
    ("report", "llama_surgery.report.page:render", 1, NOTHING),
    ("report", WRITING, 1, NOTHING),
    ("doctor", LOADING, 1, READS),
    ("demo", LOADING, 1, NOTHING),
    ("demo", FORWARD, 3, NOTHING),
    ("demo", WRITING, 1, NOTHING),
    ("demo", "llama_surgery.cli.demo:_summary", 1, SOME),
    ("plan", LOADING, 1, READS),
    ("plan", "llama_surgery.learning.forecast:shape_of", 1, READS),
    ("plan", "llama_surgery.cli.plan:_print", 1, READS),
    ("generate", LOADING, 1, READS),
    ("generate", FORWARD, 1, READS),
    ("generate", FORWARD, 3, READS),
]


@pytest.fixture(scope="module")
def results(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert run("evaluate", model, "--text", text, "--out", folder, *SHORT).exit_code == 0
    return folder / "results.json"


@pytest.mark.parametrize(("command", "function", "call", "after"), POINTS)
def test_a_command_that_is_interrupted_says_truly_what_is_left(
    command: str,
    function: str,
    call: int,
    after: str,
    model: Path,
    text: Path,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["llama_surgery.cli.demo"], "LENGTH", 640)
    monkeypatch.setattr(sys.modules["llama_surgery.cli.demo"], "PIECE", 160)
    arguments = typed(command, model, text, results, tmp_path)
    with monkeypatch.context() as patch:
        interrupted_at(patch, function, call)
        line = told(run(*arguments))
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "claims"]
    assert not list(tmp_path.rglob(".*")), "half a file"
    if after in (NOTHING, READS):
        assert line == f"Interrupted{after}" and not left
        return
    if after == GOES_ON:
        assert line == f"Interrupted: what is finished is kept in {tmp_path / 'out'}. {GOES_ON}" and left
    else:
        assert line == f"Interrupted{SOME}{', '.join(map(str, sorted(left)))}." and left
    assert run(*arguments).exit_code == 0  # with what is there already


def typed(command: str, model: Path, text: Path, results: Path, folder: Path) -> list[str]:
    """A command with its arguments; what it writes is called ``out`` in ``folder``."""
    paths = {"MODEL": model, "TEXT": text, "RESULTS": results}
    paths |= {f"OUT{suffix}": folder / f"out{suffix}" for suffix in ("", ".npz", ".html", ".csv")}
    return [command.split(",")[0], *(str(paths.get(argument, argument)) for argument in COMMANDS[command])]


def interrupted_at(patch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Interrupt the given call of ``module:function`` or ``module:class.method``."""
    owner, _, names = function.partition(":")
    *classes, name = names.split(".")
    holder = functools.reduce(getattr, classes, importlib.import_module(owner))
    original, calls = getattr(holder, name), itertools.count(1)

    @functools.wraps(original)
    def interrupting(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            interrupt()
        return original(*arguments, **options)

    patch.setattr(holder, name, interrupting)


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


def test_of_several_processes_one_speaks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["llama_surgery.cli.operate"], "load_model", interrupt)
    monkeypatch.setenv("RANK", "1")
    result = run("operate", model, "--out", tmp_path / "out")
    assert result.exit_code == 130 and not result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_at_the_first_line_which_comes_soon(
    command: str, model: Path, text: Path, results: Path, tmp_path: Path
) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "llama_surgery", *typed(command, model, text, results, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout is not None and running.stdout.readline().endswith("…\n")
    spent = psutil.Process(running.pid).cpu_times()
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    # Where the interrupt passes through code that exec() runs, Python ends by the signal: 130 to a shell.
    assert running.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in output and output.strip().splitlines()[-1].startswith("Interrupted")
    # Of this process, whatever else runs beside it.
    assert spent.user + spent.system < 3


@pytest.mark.parametrize("becomes", [None, ImportError("no such library")])
def test_ctrl_c_that_a_library_loses(becomes: Exception | None) -> None:
    def load() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None

    with pytest.raises(KeyboardInterrupt), status("Loading …"):
        load()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ImportError, match="another"), status("Loading …"):
        raise ImportError("another")


#: Starts the command line and sends Ctrl-C where a module begins to be imported.
AT_IMPORT = """
import runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("llama_surgery", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["llama_surgery.cli", "typer", "rich.console", "llama_surgery.cli.report"])
def test_ctrl_c_while_python_imports(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_IMPORT, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Interrupted: nothing was written.\n"


def test_ctrl_c_that_python_loses(capfd: pytest.CaptureFixture[str]) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), status("Loading …"):
        Finalized()
        while time.monotonic() < began + 30:
            pass
    assert time.monotonic() < began + 10 and "Traceback" not in capfd.readouterr().err
