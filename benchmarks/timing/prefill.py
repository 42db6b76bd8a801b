"""Times sparse prefill attention, whole and part by part, beside dense rivals and FlexAttention."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from llama_surgery.attention.impl.triton.job import Job, make_job
from llama_surgery.attention.impl.triton.layout.launch import build_layout
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.select import launch as selection
from llama_surgery.attention.impl.triton.tiled_plan import ENTRY, TiledPlan
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import causal_pairs, near_pairs, summary_density

from . import prefill_case as case
from .dense import check, ways
from .measure import Deadline, Rows, capture, once, say, times
from .quantities import quantiles

#: Length from which on FlexAttention is left out: its block mask has an entry for every tile and page.
FLEX_LIMIT = 1 << 18


#: Calls that take less are timed as graph replays.
GRAPH_MS = 5.0

#: Length beyond which only the first dense way is timed, once: it takes seconds.
RIVALS_LIMIT = 1 << 17


class Setting(NamedTuple):
    """What is timed at a length.

    Attributes:
        config: The topology; θ is found.
        density: Executed far density.
        flex: Time FlexAttention on the same plan too.
        parts: Time every part alone too.
    """

    config: SurgeryConfig
    density: float
    flex: bool = False
    parts: bool = False


def bench_prefill(
    cases: Iterable[tuple[int, tuple[int, int] | None]],
    settings: Callable[[int, tuple[int, int] | None], Iterable[Setting]],
    out: Path,
    *,
    deadline: Deadline,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Time the cases in turn; rows are written as they are measured.

    Args:
        cases: Length, a multiple of the tile, and shape as :func:`~timing.prefill_case.make_data` takes it.
        settings: What to time of a case, the most telling first.
        out: CSV.
        deadline: Nothing further begins after it.
    """
    rows = Rows(out, device, dtype=str(dtype).split(".")[-1])
    for length, shape in cases:
        if deadline.passed(f"prefill of {length} tokens"):
            break
        data = case.make_data(length, device, dtype, shape)
        dense = _time_dense(rows, data)
        for setting in settings(length, shape):
            if deadline.passed(f"{length} tokens, {setting.config}"):
                break
            _Timed(rows, data, setting, dense).run()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows.rows


def _time_dense(rows: Rows, data: case.Data) -> dict[str, float]:
    """Median milliseconds of every way PyTorch's SDPA runs this length."""
    length, device = data.keys.shape[1], data.keys.device
    q = data.queries.flatten(0, 1)[None]
    k, v = (x[None] for x in (data.keys, data.values))
    found: dict[str, float] = {}
    for way in ways(device, length):
        if way.backend is SDPBackend.EFFICIENT_ATTENTION:  # takes seconds, and never wins
            continue
        try:
            check(way, q, k, v)
            measured = _measure(functools.partial(way, q, k, v), device)
        except (RuntimeError, SurgeryError) as problem:  # a rival that does not run must not end the program
            say(f"{way.name} is out: {str(problem).splitlines()[0][:160]}")
            continue
        found[way.name] = measured["p50_ms"]
        pairs = causal_pairs(0, length)
        rows.add(**_shape(data), part=way.name, **measured, **_rate(data, pairs, measured))
        if length > RIVALS_LIMIT:
            break
    return found


class _Timed:
    """One setting: found θ, checked answers, then times."""

    def __init__(self, rows: Rows, data: case.Data, setting: Setting, dense: dict[str, float]) -> None:
        self.rows, self.data, self.setting, self.dense = rows, data, setting, dense
        self.length, self.device = data.keys.shape[1], data.keys.device
        config = setting.config
        layout = build_layout(data.keys, data.values, config)
        job = make_job(case.call_of(config), data.queries, data.keys, data.values, layout, start=0)
        theta = case.calibrate(job, setting.density)
        self.config = dataclasses.replace(config, theta=theta, theta_decode=theta)
        self.job: Job = dataclasses.replace(job, config=self.config)
        #: The same without summaries.
        self.bare = dataclasses.replace(
            job, config=dataclasses.replace(self.config, summary="none"), means=None
        )
        self.label = {
            **_shape(data),
            "page": config.page_size,
            "tile": config.tile,
            "far": setting.density,
        }

    def attend(self, keep_lists: bool = False) -> AttentionResult:
        """Everything: layout, selection, attention."""
        data = self.data
        layout = build_layout(data.keys, data.values, self.config)
        return prefill.attend(
            case.call_of(self.config),
            data.queries,
            data.keys,
            data.values,
            layout,
            start=0,
            keep_lists=keep_lists,
        )

    def run(self) -> None:
        result = self.attend(keep_lists=True)
        error, plain = case.check_tiles(self.job, result.plans, result.out)
        differing = case.check_selection(self.job, result.plans)
        if torch.isnan(result.out).any() or torch.isnan(result.lse).any():
            raise SurgeryError("the sparse path wrote NaN.")
        executed = case.executed_density(result.plans, self.config.page_size, self.length)
        visible = sum(float(p.visible_pairs(self.config.page_size).double().mean()) for p in result.plans)
        summaries = summary_density(self.config, self.length)
        near = near_pairs(0, self.length, self.config, self.config.tile)
        causal = causal_pairs(0, self.length)
        pages = torch.cat([plan.counts.flatten() for plan in result.plans]).float().sort().values
        if self.setting.parts:
            self.time_parts(near)
        measured = _measure(self.attend, self.device)
        speedups = {f"over_{name}": ms / measured["p50_ms"] for name, ms in self.dense.items()}
        self.rows.add(
            **self.label, part="attention with layout and selection", **measured, **speedups,
            theta=self.config.theta, executed_far=executed, total_density=executed
            + near / causal + summaries, summary_density=summaries,
            visible_far=visible / causal, pages_p50=float(pages[len(pages) // 2]),
            pages_p95=float(pages[int(0.95 * (len(pages) - 1))]), error=error, plain_error=plain,
            differing=differing,
        )  # fmt: skip
        if self.setting.flex and self.length < FLEX_LIMIT and self.device.type == "cuda":
            self.time_flex(result.plans)

    def add(
        self, part: str, call: Callable[[], Any], pairs: float | None = None, *, less: float = 0.0
    ) -> float:
        """Time a part; returns its median in milliseconds. ``less`` of them are something else's in it."""
        measured = {name: ms - less for name, ms in _measure(call, self.device).items()}
        rate = {} if pairs is None else _rate(self.data, pairs, measured)
        self.rows.add(**self.label, part=part, **measured, **rate)
        return measured["p50_ms"]

    def time_parts(self, near_pairs: int) -> None:
        """Layout, selection with summaries, near field, each alone, and what far pages add."""
        data, job, bare, config = self.data, self.job, self.bare, self.config
        strips = list(job.strips())
        out, lse = case.outputs_of(job)

        def select() -> list[TiledPlan]:
            return [selection.select(job, strip, out, lse) for strip in strips if strip.pages]

        def attention(job: Job, plans: list[TiledPlan], pages: bool = True) -> None:
            left = iter(plans)
            for strip in strips:
                plan = next(left) if strip.pages else None
                prefill.attend_strip(job, strip, plan if pages else None, out, lse)

        plans = select()
        attention(job, plans)
        case.check_tiles(job, plans, out)
        far_pairs = case.executed_pairs(plans, config.page_size)
        self.add("layout", lambda: build_layout(data.keys, data.values, config))
        self.add("selection", select)
        near = self.add("near field", lambda: attention(bare, plans, pages=False), near_pairs)
        attention(bare, plans)
        case.check_tiles(bare, plans, out)
        self.add("far pages", lambda: attention(bare, plans), far_pairs, less=near)
        self.add("near field and far pages", lambda: attention(bare, plans), near_pairs + far_pairs)
        scattered = case.scattered_plans(job, plans, self.setting.density)
        attention(bare, scattered)
        case.check_tiles(bare, scattered, out)
        pairs = case.executed_pairs(scattered, config.page_size)
        self.add("far pages, scattered", lambda: attention(bare, scattered), pairs, less=near)

    def time_flex(self, plans: list[TiledPlan]) -> None:
        """FlexAttention knows no first-open rows: a page is open for a whole tile."""
        opened = [dataclasses.replace(p, entries=p.entries // ENTRY * ENTRY) for p in plans]  # type: ignore[operator]
        try:
            call = case.flex_call(self.job, opened)
            case.check_tiles(self.bare, opened, call())
            self.add("FlexAttention", call)
        except Exception as problem:  # a rival that does not run must not end the program
            say(f"FlexAttention did not run: {str(problem).splitlines()[0][:200]}")


def _shape(data: case.Data) -> dict[str, int]:
    streams, group, length, _ = data.queries.shape
    return {"n": length, "heads": streams * group, "kv_heads": streams}


def _rate(data: case.Data, pairs: float, measured: dict[str, float]) -> dict[str, float]:
    streams, group, _, dim = data.queries.shape
    flops = pairs * streams * group * 4 * dim
    return {"flops": flops, "tflops": flops / measured["p50_ms"] / 1e9}


def _measure(run: Callable[[], Any], device: torch.device, budget_ms: float = 250.0) -> dict[str, float]:
    """Quantiles of milliseconds of calls after the first, in which kernels may be compiled.

    Calls of a few milliseconds are timed as replays of a CUDA graph: launching them takes as long as running.
    Of those that take seconds one is enough.
    """
    first = once(run, device)
    if device.type != "cuda":
        return quantiles([first])
    again = times(run, device, 1)[0]
    if again > 8 * budget_ms:
        return quantiles([again])
    if again < GRAPH_MS:
        run, _ = capture(run)
        again = times(run, device, 1)[0]
    return quantiles(times(run, device, max(3, min(50, int(budget_ms / again)))))
