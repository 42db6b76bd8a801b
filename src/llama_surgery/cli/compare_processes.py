"""Measuring for ``llama-surgery compare``: in this process, or in several that share the GPUs."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llama_surgery.cli.common import Dtype, err, escape, load_model, progress, topology_of
from llama_surgery.errors import SurgeryError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far a process came.

    Attributes:
        no_memory: Cells for which there was not enough memory.
        error: Why it ended early, if it failed.
        refused: The error is one of the package's own.
    """

    no_memory: Sequence[str] = ()
    error: str = ""
    refused: bool = False


def measure(
    first: Sequence[str] = (),
    *,
    forms: Sequence[str],
    model: str,
    device: str,
    dtype: Dtype,
    tf32: bool,
    text: Path,
    calibration_text: Path,
    adapter: Path | None,
    folder: Path,
    deadline: float | None,
    **settings: Any,
) -> Outcome:
    """Load the model and measure what is not there yet of these forms.

    Args:
        first: What to finish before the others are begun.
        forms: What to measure, dense among them or not.
        model: Folder of a checkpoint, or its name on the Hub.
        device: Where to run.
        dtype: Precision.
        tf32: Multiply float32 matrices in TF32.
        text: Text to measure on.
        calibration_text: Other text.
        adapter: Folder of an adapter to compare.
        folder: Of the comparison.
        deadline: ``time.monotonic()`` after which nothing is begun.
        settings: Further arguments of :class:`~llama_surgery.evaluation.compare.Comparison`.

    Raises:
        SurgeryError: The model, a text or the adapter cannot be used, the folder holds another comparison,
            or a loss is not finite.
    """
    import torch

    from llama_surgery.evaluation.compare import Comparison
    from llama_surgery.text import read_texts

    if tf32:
        torch.set_float32_matmul_precision("high")
    texts, calibration = read_texts(text), read_texts(calibration_text)
    longest = max(settings["length"], *settings["needle_lengths"])
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter, longest=longest)
    comparison = Comparison(
        llm,
        tokenizer,
        folder,
        texts=texts,
        calibration=calibration,
        adapter=None if adapter is None else topology_of(llm, adapter),
        **settings,
    )
    with progress() as tell:
        comparison.run(forms, deadline, tell, first=first)
    return Outcome(comparison.no_memory)


def measure_in_processes(shares: Sequence[Sequence[str]], *, folder: Path, **asked: Any) -> list[Outcome]:
    """:func:`measure` in a process for each share. When one fails, the others go on to their end.

    Args:
        shares: Forms that each process is to finish before it helps with the others'.
        folder: Of the comparison.
        asked: Further arguments of :func:`measure`.

    Returns:
        How far each process came.

    Raises:
        SurgeryError: Every process was refused for the same reason, and none had finished a cell.
    """
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
    processes: dict[Any, BaseProcess] = {}  # by the pipe that its outcome comes through
    outcomes: dict[Any, Outcome] = {}
    cells = folder / "cells"
    seen = set(cells.glob("*.json"))
    before = len(seen)
    try:
        for index, first in enumerate(shares):
            pipe, tell = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=_work, args=(tell, index, len(shares), first), kwargs={"folder": folder, **asked}
            )
            with _deaf():
                process.start()
            tell.close()  # the process then holds the only open end: when it dies, the pipe ends
            processes[pipe] = process
        with err.status(f"{len(shares)} processes measure …"):
            while len(outcomes) < len(processes):
                for ended in wait(processes.keys() - outcomes.keys(), timeout=1):
                    outcomes[ended] = _received(ended, processes[ended])
                for cell in sorted(set(cells.glob("*.json")) - seen):
                    seen.add(cell)
                    err.print(f"Cell {len(seen)} finished: {escape(cell.stem)}", highlight=False)
    finally:
        if len(outcomes) < len(shares):  # this process was interrupted
            for running in processes.values():
                running.terminate()
        for running in processes.values():
            running.join()
    found = [outcomes[pipe] for pipe in processes]
    if found[0].refused and all(outcome == found[0] for outcome in found) and len(seen) == before:
        raise SurgeryError(found[0].error)
    return found


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started meanwhile never hears Ctrl-C, not even before it has come to :func:`_work`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_failures(outcomes: Sequence[Outcome]) -> bool:
    """Say why processes failed, each reason once. Returns whether any did."""
    errors = list(dict.fromkeys(outcome.error for outcome in outcomes if outcome.error))
    for error in errors:
        err.print(f"[bold red]Failed:[/] {escape(error)}", highlight=False, soft_wrap=True)
    return bool(errors)


def _received(pipe: Connection, process: BaseProcess) -> Outcome:
    """What a process sent before it ended, or what is known of one that could not."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return Outcome(error=f"the process {how}{hint}.")


def _work(
    tell: Connection, index: int, count: int, share: Sequence[str], *, device: str, **asked: Any
) -> None:
    """What the process ``index`` of ``count`` does: measure, and send the outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the first process ends the others
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    log = logging.getLogger("llama_surgery")
    log.addHandler(logging.NullHandler() if index else logging.StreamHandler())  # of all, one gives warnings
    err.quiet = True  # progress bars of several processes would write over each other
    try:
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // count)))
        outcome = measure(share, device=_device_of(index, device), **asked)
    except SurgeryError as error:
        outcome = Outcome(error=str(error), refused=True)
    except Exception as error:
        tell.send(Outcome(error=f"{type(error).__name__}: {error}"))
        raise  # not expected: with its traceback
    tell.send(outcome)


def _end_with(parent: BaseProcess) -> None:
    """End this process when ``parent`` ends, which may be killed before it can end the others."""
    parent.join()
    os._exit(1)


def _device_of(index: int, device: str) -> str:
    """The device of process ``index``: GPUs in turn, where it was left open which one."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.device_count():
        return device
    turn = index % torch.cuda.device_count()
    torch.cuda.set_device(turn)  # also for what names no device
    return f"cuda:{turn}"
