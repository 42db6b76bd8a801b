"""Time to first token and time of a decode step of a whole model, dense and operated.

    python benchmarks/end_to_end.py benchmarks/configs/llama-3.1-8b-shapes.json --length 128k

The model has the shapes of a ``config.json`` and random weights. The dense side reads a preallocated
``StaticCache`` through the backend of PyTorch's SDPA that is fastest for the very shapes, found first and
named. Decode steps of both sides are replays of CUDA graphs of the whole model, one step each; the operated
side's include the filling of chunks. θ is found for the densities asked for; those that came out are printed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_surgery.attention.executor import backend_name
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import config_of, reset_statistics, set_config, statistics
from llama_surgery.surgery.steps import GraphedSteps

from . import model as models
from .dense import fastest
from .dense_model import DenseModel, repeat_static
from .measure import Deadline, Rows, graphed, once, say, times
from .quantities import forget_peak, peak_gib, quantiles

#: Tokens of the prompt on which the operated model is checked.
CHECKED = 2048


@dataclasses.dataclass(frozen=True)
class Task:
    """What is compared.

    Attributes:
        config: The topology; θ is found.
        length: Tokens of the prompt.
        batch: Sequences of a decode step.
        density: Executed far density of the prefill.
        decode_density: Of a decode step.
        steps: Decode steps that are timed.
        prefills: Prefills that are timed.
    """

    config: SurgeryConfig
    length: int
    batch: int = 4
    density: float = 0.05
    decode_density: float = 0.03
    steps: int = 64
    prefills: int = 2

    @property
    def room(self) -> int:
        """Tokens of the longest sequence."""
        return self.length + self.steps + 16


@torch.inference_mode()
def end_to_end(
    path: Path, tasks: list[Task], out: Path, *, seconds: float, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Run the tasks; rows are written as they are measured.

    Args:
        path: ``config.json`` of the model, or its folder.
        tasks: The most telling first.
        out: CSV.
        seconds: No further part begins after this many.

    Raises:
        SurgeryError: There is no such model, or an answer is wrong.
    """
    deadline, rows = Deadline(seconds), Rows(out, device, model=path.stem, dtype=str(dtype).split(".")[-1])
    model = models.random_model(path, device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{path}: {parameters / 1e9:.2f} billion parameters, {deadline.spent:.0f} s")
    for task in tasks:
        if deadline.passed(f"{task.length} tokens"):
            break
        length = min(CHECKED, task.length)
        ids = models.random_ids(model, 1, length + models.STEPS, seed=1)
        error, own = models.check_against_dense(model, task.config, ids)
        say(
            f"everything open, {length} tokens: logits differ by {error:.2e}, of two dense backends {own:.2e}"
        )
        dense = _dense(model, task, rows, deadline)
        _operated(model, task, rows, deadline, dense)
    say(f"{len(rows.rows)} rows in {out}, {deadline.spent:.0f} s")
    return rows.rows


def _dense(model: PreTrainedModel, task: Task, rows: Rows, deadline: Deadline) -> dict[str, float]:
    """Measure the dense side: milliseconds and GiB by part."""
    device, found = model.device, dict[str, float]()
    ids = models.random_ids(model, 1, task.length)
    side = DenseModel(model, task.length, task.room)
    try:
        side.way = fastest(*models.random_states(model, 1, task.length, task.length))[0]
        side.visible = min(1024, task.length)
        models.prefill(model, ids[:, : side.visible], side.cache())  # libraries wake up
        side.visible = task.length
        measured = []
        for _ in range(task.prefills):
            if measured and deadline.passed("another dense prefill"):
                break
            cache = None  # the last one's memory is not this one's
            forget_peak(device)
            cache = side.cache()
            measured.append(once(lambda c=cache: models.prefill(model, ids, c), device))
        found["prefill"], found["prefill GiB"] = min(measured), peak_gib(device)
        rows.add(
            part="prefill", side="dense", backend=side.way.name, length=task.length, batch=1,
            **quantiles(sorted(measured)), peak_gib=found["prefill GiB"],
        )  # fmt: skip
        if deadline.passed("dense decode"):
            return found
        repeat_static(cache, task.batch)
        side.visible = task.length + 1
        side.way = fastest(*models.random_states(model, task.batch, 1, side.visible))[0]
        forget_peak(device)
        step = side.step(ids[:, -1:].repeat(task.batch, 1), cache)
        step()
        measured = times(graphed(step, device), device, task.steps)
        found["decode"], found["decode GiB"] = measured[len(measured) // 2], peak_gib(device)
        rows.add(
            part="decode", side="dense", backend=side.way.name, length=task.length, batch=task.batch,
            **quantiles(measured), peak_gib=found["decode GiB"],
        )  # fmt: skip
    finally:
        side.close()
    return found


def _operated(
    model: PreTrainedModel, task: Task, rows: Rows, deadline: Deadline, dense: dict[str, float]
) -> None:
    """Measure the operated side."""
    if deadline.passed("the operated side"):
        return
    device, ids = model.device, models.random_ids(model, 1, task.length)
    with operated(model, task.config):
        theta = models.prefill_theta(model, ids, task.density)
        set_config(model, dataclasses.replace(task.config, theta=theta, theta_decode=theta))
        measured = []
        for _ in range(task.prefills):
            cache = None
            if measured and deadline.passed("another operated prefill"):
                break
            forget_peak(device)
            reset_statistics(model)
            cache = models.fresh_cache(model, task.room)
            measured.append(once(lambda c=cache: models.prefill(model, ids, c), device))
        rows.add(
            part="prefill", side="operated", backend=_executor(model), length=task.length, batch=1,
            **quantiles(sorted(measured)), peak_gib=peak_gib(device),
            **_against(dense, "prefill", min(measured), peak_gib(device)), **_densities(model),
        )  # fmt: skip
        if cache is None or deadline.passed("operated decode"):
            return
        cache.batch_repeat_interleave(task.batch)
        last = ids[:, -1:].repeat(task.batch, 1)
        models.decode_theta(model, last, cache, task.decode_density)
        forget_peak(device)
        reset_statistics(model)
        try:
            steps, name = _steps(model, cache, last, graph=device.type == "cuda")
            steps()
        except SurgeryError as problem:
            say(f"no graph of the operated steps: {problem}")
            steps, name = _steps(model, cache, last, graph=False)
            steps()
        reset_statistics(model)
        steps()  # counters started anew: the graph is captured anew
        measured = times(steps, device, task.steps - 2)
        middle = measured[len(measured) // 2]
        rows.add(
            part="decode", side="operated", backend=name, length=task.length, batch=task.batch,
            **quantiles(measured), peak_gib=peak_gib(device),
            **_against(dense, "decode", middle, peak_gib(device)), **_densities(model),
        )  # fmt: skip


def _executor(model: PreTrainedModel) -> str:
    """Who executes the calls of an operated model's prefill."""
    keys = models.random_states(model, 1, 1, 1)[1]
    return backend_name(config_of(model), keys, keys, config_of(model).tile)


def _steps(model: PreTrainedModel, cache: Any, last: torch.Tensor, *, graph: bool) -> tuple[Any, str]:
    """A call for the next decode step, and how it is executed."""
    if not graph:
        return lambda: model(last, use_cache=True, **{cache_name(model): cache}), "eager"
    recorded = GraphedSteps(model, cache)
    return lambda: recorded.step(last), "CUDA graph"


def _against(dense: dict[str, float], part: str, ms: float, gib: float) -> dict[str, float]:
    if part not in dense:
        return {}
    return {"speedup": dense[part] / ms, "memory_of_dense": gib / dense[f"{part} GiB"]}


def _densities(model: PreTrainedModel) -> dict[str, float]:
    found, config = statistics(model), config_of(model)
    return {
        "total_density": found.total_density,
        "far_density": found.far_density,
        "visible_far_density": found.visible_far_density,
        "theta": config.theta,
        "theta_decode": config.theta_for(1),
        "page_size": config.page_size,
        "tile": config.tile,
        "dense_until": config.dense_until,
    }
