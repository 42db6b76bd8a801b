"""Times decode attention over a paged cache beside dense rivals.

A graph holds one call on each of several caches, together more than four times the L2 cache that a call finds
empty; times are per call. Every timing follows a check against float64 on the planted pages. A step run
appends a token, attends, and lays out chunks that are full: its p99 and its worst step are the latencies of
generation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llama_surgery.attention.impl.triton.decode.cache import append_tokens
from llama_surgery.attention.impl.triton.decode.launch import decode
from llama_surgery.surgery.store import SequenceStore

from . import decode_case as case
from .decode_case import Layer, Setting
from .decode_paged import block_tables, paged, same
from .dense import ways
from .measure import Deadline, Rows, graphed, say, synchronise, times
from .quantities import quantiles

SETTINGS = (
    Setting(1 << 17, 1),
    Setting(1 << 15, 1),
    Setting(1 << 17, 8),
    Setting(1 << 15, 8),
    Setting(1 << 17, 1, page=32),
    Setting(1 << 17, 8, page=32),
    Setting(1 << 17, 1, rows=4),
)

#: The same kernels where every query sees everything, which is no rival of theirs.
ALL_NEAR = "decode, everything visible"

#: Of the comparison with an engine's paged cache.
PAGED_SETTINGS = tuple(Setting(1 << 17, batch, ragged=True) for batch in (1, 4, 16, 64))


def bench_decode(
    settings: tuple[Setting, ...],
    out: Path,
    *,
    deadline: Deadline,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    flex: bool = True,
) -> list[dict[str, Any]]:
    """Time all settings, the most telling first; rows are written as they are measured.

    Without ``flex`` FlexAttention, whose compilation takes most of the time, is left out.
    """
    rows = Rows(out, device, dtype=str(dtype).split(".")[-1], peak_bytes_per_s=peak_bandwidth(device))
    for setting in settings:
        if deadline.passed(str(setting)):
            break
        time = time_paged if setting.ragged else functools.partial(time_setting, flex=flex)
        time(rows, setting, device, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows.rows


def time_setting(
    rows: Rows, setting: Setting, device: torch.device, dtype: torch.dtype, *, flex: bool = True
) -> None:
    """All rows of one setting."""
    layers, gap = case.build(setting, copies_for(setting, device), device, dtype)
    results = [decode(x.queries, x.cache) for x in layers]
    errors = [case.check(setting, x, r) for x, r in zip(layers, results, strict=True)]
    facts = case.facts_of(setting, results) | {
        "theta": layers[0].cache.config.theta_for(1),
        "gap": gap,
        "copies": len(layers),
        "error": max(e for e, _ in errors),
        "plain_error": max(p for _, p in errors),
    }
    ours = measure(layers, lambda x: decode(x.queries, x.cache))
    p50, dense = ours["p50_ms"], dict[str, float]()
    dense_bytes = setting.batch * case.KV_HEADS * setting.length * 2 * case.DIM * dtype.itemsize
    for name, call in rivals(setting, device, flex=flex) if setting.rows == 1 else ():
        try:
            case.check_dense(setting, layers[0], call(layers[0]).reshape(-1, case.HEADS, case.DIM))
            found = measure(layers, call)
        except Exception as problem:  # a rival that does not run must not end the program
            say(f"{name} did not run: {str(problem).splitlines()[0][:200]}")
            synchronise(device)
            continue
        times_ours = found["p50_ms"] / p50
        rows.add(
            **setting.label, part=name, **found, **_rate(rows, dense_bytes, found), over_decode=times_ours
        )
        if name != ALL_NEAR:
            dense[name] = found["p50_ms"]
    moved = case.bytes_of(setting, results)
    winner = min(dense, key=lambda name: dense[name], default=None)
    against = {"speedup": dense[winner] / p50, "fastest_rival": winner} if winner else {}
    rows.add(**setting.label, part="decode", **ours, **_rate(rows, moved, ours), **against, **facts)
    steps = step_run(layers, setting, device)
    against = {"p99_speedup": dense[winner] / steps["p99_ms"]} if winner else {}
    rows.add(**setting.label, part="step", **steps, **against)


def time_paged(rows: Rows, setting: Setting, device: torch.device, dtype: torch.dtype) -> None:
    """The same sequences in a contiguous cache and in an engine's: ``lost`` is what the latter costs more.

    Both are timed twice, in turn, and the faster median of each counts.
    """
    layers, gap = case.build(setting, copies_for(setting, device), device, dtype)
    tables = block_tables(setting, device)
    scattered = [paged(layer, tables) for layer in layers]
    same(setting, layers, scattered)
    results = [decode(x.queries, x.cache) for x in scattered]
    errors = [case.check(setting, x, r) for x, r in zip(layers, results, strict=True)]
    facts = case.facts_of(setting, results) | {"gap": gap, "copies": len(layers)}
    facts |= {"error": max(e for e, _ in errors), "plain_error": max(p for _, p in errors)}
    kinds = {"contiguous": layers, "paged": scattered}
    found: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for name, chosen in kinds.items():
            new = measure(chosen, lambda x: decode(x.queries, x.cache), 200.0)
            found[name] = min(found.get(name, new), new, key=lambda times: times["p50_ms"])
    lost = found["paged"]["p50_ms"] / found["contiguous"]["p50_ms"] - 1
    moved = case.bytes_of(setting, results)
    for name, times_ in found.items():
        rows.add(
            **setting.label, part=name, **times_, **_rate(rows, moved, times_),
            lost=lost if name == "paged" else 0.0, tokens=sum(setting.lengths), **facts,
        )  # fmt: skip


def _rate(rows: Rows, moved: float, found: dict[str, float]) -> dict[str, float]:
    rate = moved / found["p50_ms"] * 1e3
    return {"bytes": int(moved), "GB_per_s": rate / 1e9, "of_peak": rate / rows.common["peak_bytes_per_s"]}


def measure(layers: list[Layer], call: Callable[[Layer], Any], budget_ms: float = 400.0) -> dict[str, float]:
    """Quantiles of milliseconds per call, on each layer in turn."""
    device = layers[0].queries.device
    replay = graphed(lambda: [call(x) for x in layers], device)
    middle = times(replay, device, 3)[1]
    count = max(20, min(400, int(budget_ms / middle))) if device.type == "cuda" else 1
    return quantiles([ms / len(layers) for ms in times(replay, device, count)])


def step_run(layers: list[Layer], setting: Setting, device: torch.device) -> dict[str, float]:
    """Quantiles, mean and maximum of single steps per layer while the text grows."""
    lengths = layers[0].cache.lengths

    def step() -> None:
        for layer in layers:
            append_tokens(layer.cache, *layer.new)
            decode(layer.queries, layer.cache)
        lengths.add_(setting.rows)

    replay_step = graphed(step, device)
    lengths.fill_(setting.start)
    stores = [SequenceStore(setting.config, layer.buffers, length=setting.start) for layer in layers]

    def one() -> None:
        replay_step()
        for store in stores:
            store.length += setting.rows
            store.lay_out()

    measured = times(one, device, case.STEPS // setting.rows - 8)
    lengths.fill_(setting.start)
    each = [ms / len(layers) for ms in measured]
    return quantiles(each) | {"max_ms": each[-1]}


def rivals(
    setting: Setting, device: torch.device, *, flex: bool = True
) -> Iterator[tuple[str, Callable[[Layer], torch.Tensor]]]:
    """Dense attention of one row over the same keys: name and call."""

    def states(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = (x.flatten(2, 3) for x in (layer.cache.keys, layer.cache.values))
        q = layer.queries.unflatten(0, (setting.batch, -1)).flatten(1, 2)
        return q, k[:, :, : setting.length], v[:, :, : setting.length]

    for way in ways(device, 1):
        yield way.name, lambda layer, way=way: way(*states(layer))
    if flex and device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(functools.partial(flex_attention, enable_gqa=True), dynamic=False)
        yield "FlexAttention", lambda layer: compiled(*states(layer))

    def all_near(layer: Layer) -> torch.Tensor:
        return decode(layer.queries, dataclasses.replace(layer.cache, features=None)).out

    yield ALL_NEAR, all_near


def peak_bandwidth(device: torch.device) -> float:
    """Bytes per second of the memory interface where the driver says, else NaN."""
    if device.type != "cuda":
        return math.nan
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "memory_clock_rate", math.nan)
    return 2 * clock * 1e3 * getattr(properties, "memory_bus_width", math.nan) / 8


def copies_for(setting: Setting, device: torch.device) -> int:
    """Caches whose touched bytes are more than four times the L2 cache; one that empties it by itself."""
    if device.type != "cuda":
        return 1
    tokens = sum(setting.lengths)
    touched = (setting.far * tokens + setting.batch * setting.config.chunk_size) * 2 * case.DIM * 2
    touched += tokens / setting.page * 2 * case.DIM * 2
    fits = torch.cuda.get_device_properties(device).L2_cache_size / (touched * case.KV_HEADS)
    return 1 if fits < 1 / 8 else max(2, math.ceil(4 * fits) + 1)
