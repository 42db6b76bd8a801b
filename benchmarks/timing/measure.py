"""Times, memory, graphs, a deadline, and a table whose rows are written as they are measured."""

import datetime
import importlib
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_surgery.files import write_csv


class Deadline:
    """Says when no further part should begin."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.perf_counter(), seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.begin

    def passed(self, part: str) -> bool:
        """True, with a message, if time is up."""
        if self.spent < self.seconds:
            return False
        say(f"{self.spent:.0f} s are spent: {part} is not run (give more --seconds)")
        return True


class Rows:
    """Rows of a CSV, printed and written as they come."""

    def __init__(self, path: Path, device: torch.device, **common: Any) -> None:
        self.path, self.common, self.rows = path, environment(device) | common, list[dict[str, Any]]()

    def add(self, **row: Any) -> dict[str, Any]:
        """Add a row; numbers are rounded to four digits."""
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        say(" ".join(f"{key}={value}" for key, value in row.items()))
        self.rows.append(row | self.common)
        write_csv(self.path, self.rows)
        return row


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on: date, device, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {}
    for library in ("torch", "transformers", "triton"):
        try:  # their own word: installed packages have other names (pytorch-triton)
            versions[library] = importlib.import_module(library).__version__
        except ImportError:
            versions[library] = ""
    return {"date": datetime.date.today().isoformat(), "device": name} | versions


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device idle before."""
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return (time.perf_counter() - begin) * 1e3


def times(run: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Sorted milliseconds of ``count`` calls; on a GPU they are enqueued without waiting."""
    if device.type != "cuda":
        return sorted(once(run, device) for _ in range(count))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return sorted(begin.elapsed_time(end) for begin, end in events)


def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Replay of a CUDA graph of the call, and what the call returned while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = run()
    return graph.replay, returned


def nearest_theta(
    density: Callable[[float], float], wanted: float, what: str, *, halvings: int = 12
) -> float:
    """θ at which a falling ``density`` comes nearest to ``wanted``, by halving an interval of log θ."""
    low, high, tried = math.log(1e-7), 0.0, dict[float, float]()
    for _ in range(halvings):
        middle = math.exp((low + high) / 2)
        tried[middle] = density(middle)
        low, high = (math.log(middle), high) if tried[middle] > wanted else (low, math.log(middle))
    best = min(tried, key=lambda theta: abs(tried[theta] - wanted))
    say(f"θ {best:.3e}: far density {tried[best]:.4f} for {wanted} {what}")
    return best


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A replay of the call on a GPU, the call itself elsewhere."""
    return capture(run)[0] if device.type == "cuda" else run
