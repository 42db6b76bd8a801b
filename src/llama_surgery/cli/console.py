"""What commands print, and where: results, what is going on, progress."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from llama_surgery.config import SurgeryConfig
from llama_surgery.files import json_text

#: Results go to standard output; progress, hints and errors to standard error.
out = Console()
err = Console(stderr=True)
#: Seconds between two lines of progress where there is no terminal.
INTERVAL = 10.0


@contextmanager
def status(what: str) -> Iterator[None]:
    """Says what is going on: a spinner on a terminal, a line elsewhere, on standard error."""
    if not err.is_terminal:
        say(what, err)
    with _interrupted(), err.status(what) if err.is_terminal else nullcontext():
        yield


@contextmanager
def _interrupted() -> Iterator[None]:
    """Ctrl-C ends the block whatever becomes of its exception: libraries lose it in what imports run, or take
    it for a failure of these, and Python only prints one that a finalizer raised: then it is raised anew."""
    usual, report = signal.default_int_handler, sys.unraisablehook
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != usual:
        yield
        return
    heard: list[bool] = []
    again: list[threading.Timer] = []

    def hear(*given: Any) -> None:
        heard.append(True)
        usual(*given)

    def lost(what: Any) -> None:
        if what.exc_type is not KeyboardInterrupt:
            report(what)
            return
        # Not from here: Python drops what a hook raises as well.
        again.append(threading.Timer(0.01, _thread.interrupt_main))
        again[-1].start()

    signal.signal(signal.SIGINT, hear)
    sys.unraisablehook = lost
    try:
        yield
    except Exception as error:
        if heard:
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = report
        for timer in again:
            timer.cancel()
        if signal.getsignal(signal.SIGINT) is hear:
            signal.signal(signal.SIGINT, usual)
    if heard:
        raise KeyboardInterrupt


def say(text: str, to: Console = out) -> None:
    """Print a line as it stands: neither wrapped nor with its figures coloured."""
    to.print(text, soft_wrap=True, highlight=False)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (stage, steps done, steps in all).

    On a terminal there are bars, on standard error. Elsewhere a line where a stage begins, and then one every
    ``INTERVAL`` seconds at most.
    """
    if not err.is_terminal:
        yield _lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=None),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=err) as bars:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell


def _lines() -> Callable[[str, int, int], None]:
    begun: dict[str, float] = {}
    last = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if stage in begun and now - last < INTERVAL:
            return
        began, last = begun.setdefault(stage, now), now
        err.print(
            f"{stage}: {done}/{total}, {now - began:.0f} s", soft_wrap=True, highlight=False, markup=False
        )

    return tell


def print_json(value: Any) -> None:
    """Write ``value`` to standard output as JSON."""
    sys.stdout.write(json_text(value))
    sys.stdout.flush()


def speed_told(until: int, context: int | None) -> str:
    """From where on prompts are sparse, and why not before."""
    if not until:
        return "Sparse prompts are read faster here at every length that was timed."
    if context is None or until < context:
        return (
            f"Prompts are dense below position {until:,}: up to there sparse ones are not read faster here."
        )
    return (
        f"On this device sparse prompts are not faster at any length that the model was made for ({context:,}"
        " tokens), so all is read densely. --dense-until 0 has them sparse all the same."
    )


def thresholds(config: SurgeryConfig) -> str:
    """The thresholds in words."""
    decode = f"{config.theta_decode:.3%} in decode" if config.theta_decode else "decode steps read everything"
    beyond = f", less beyond {config.theta_length:,} tokens" if config.theta_length else ""
    return f"θ = {config.theta:.3%} in prefill{beyond}, {decode}"
