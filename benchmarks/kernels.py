"""Times every part of sparse prefill attention by itself, beside dense rivals, and writes a CSV.

    python benchmarks/kernels.py --lengths 8k 32k 128k --seconds 400

Shapes are those of an 8-billion-parameter Llama: 32 query and 8 KV heads of 128, bfloat16, batch 1. Keys
and queries are clustered, so that pages differ as those of text do; θ is set per length to the asked
executed far density. Every timing of attention follows a check of sampled tiles against float64.
``--tune`` sweeps launch configurations instead.
"""

import argparse
import csv
import dataclasses
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_surgery.attention.impl.triton import prefill
from llama_surgery.attention.impl.triton.job import Job, make_job, make_levels
from llama_surgery.attention.impl.triton.layout import build_layout
from llama_surgery.attention.impl.triton.tiled_plan import ENTRY, TiledPlan
from llama_surgery.attention.impl.triton.tuning import Tuning
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Moments, merge_moments
from llama_surgery.topology.selection import Scorer

STREAMS, HEADS, DIM = 8, 4, 128
CLUSTERS = 64
RESULTS = Path(__file__).parent / "results" / "kernels.csv"


@dataclasses.dataclass
class Data:
    """Queries (streams, heads, n, dim), keys and values (streams, n, dim) of one layer."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def make_data(length: int, device: torch.device, seed: int = 0) -> Data:
    """Keys that stay in one of CLUSTERS clusters for a while, queries that look for one."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(STREAMS, CLUSTERS, DIM, device=device, generator=generator) * 0.65

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, DIM, device=device, generator=generator, dtype=torch.bfloat16)

    def walk(stay: int) -> torch.Tensor:
        count = -(-length // stay)
        topic = torch.randint(CLUSTERS, (STREAMS, count), device=device, generator=generator)
        topic = topic.repeat_interleave(stay, 1)[:, :length, None].expand(-1, -1, DIM)
        return centres.gather(1, topic).bfloat16()

    keys = normal(STREAMS, length) + walk(24)
    queries = normal(STREAMS, HEADS, length) + walk(64)[:, None]
    return Data(queries, keys, normal(STREAMS, length))


def measure(call: Callable[[], object], budget_ms: float = 300.0) -> tuple[float, float, float]:
    """p20, p50 and p80 in milliseconds, caches flushed between runs."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = (time.perf_counter() - begin) * 1e3
    if once < 50:
        quantiles = [0.2, 0.5, 0.8]
        found = triton.testing.do_bench(call, warmup=10, rep=budget_ms, quantiles=quantiles)
        return float(found[0]), float(found[1]), float(found[2])
    times = []
    for _ in range(max(2, min(5, int(budget_ms / once)))):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    times.sort()
    return times[0], times[len(times) // 2], times[-1]


# --- the plan ---------------------------------------------------------------------------------


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def plans_of(job: Job, theta: float, totals: list[torch.Tensor]) -> list[TiledPlan]:
    config = dataclasses.replace(job.config, theta=theta, theta_decode=theta)
    job = dataclasses.replace(job, config=config)
    far = [strip for strip in job.strips() if strip.pages]
    return [prefill.list_pages(job, s, t) for s, t in zip(far, totals, strict=True)]


def executed_density(plans: list[TiledPlan], page_size: int, length: int) -> float:
    pairs = sum(int(p.executed_pairs(page_size).sum()) for p in plans)
    return pairs / STREAMS / causal_pairs(length)


def calibrate(job: Job, totals: list[torch.Tensor], density: float) -> float:
    """θ whose executed far density is nearest to ``density``."""
    low, high = math.log(1e-7), math.log(0.9)
    for _ in range(14):
        middle = (low + high) / 2
        plans = plans_of(job, math.exp(middle), totals)
        got = executed_density(plans, job.config.page_size, job.stop)
        low, high = (middle, high) if got > density else (low, middle)
    return math.exp((low + high) / 2)


def random_plans(job: Job, plans: list[TiledPlan], density: float) -> list[TiledPlan]:
    """As many pages for every tile as visible ones allow at this density, spread at random."""
    share = density * causal_pairs(job.stop) / sum(
        job.tile * job.config.page_size * strip.tiles * 0.5 * (strip.pages + first)
        for strip, first in (
            (s, job.pages_of(s.first_tile)) for s in job.strips() if s.pages
        )
    )  # fmt: skip
    made = []
    for strip, plan in zip((s for s in job.strips() if s.pages), plans, strict=True):
        closed = [job.pages_of(strip.first_tile + t) for t in range(strip.tiles)]
        pages = torch.tensor(closed, device=plan.counts.device)
        counts = (pages * min(1.0, share)).round().clamp_min(1).minimum(pages).int()
        most = int(counts.max())
        place = torch.arange(most, device=pages.device)
        jitter = torch.rand(STREAMS, strip.tiles, most, device=pages.device)
        width = pages / counts.clamp_min(1)
        page = ((place + jitter) * width[:, None]).int().minimum((pages - 1).clamp_min(0)[:, None])
        opened = torch.randint(0, job.tile // 2, page.shape, device=pages.device)
        entries = torch.zeros_like(plan.entries)  # type: ignore[arg-type]
        entries[..., :most] = (page * ENTRY + opened).int()
        counts = counts.expand(STREAMS, -1).contiguous()
        made.append(dataclasses.replace(plan, counts=counts, entries=entries))
    return made


# --- checks -----------------------------------------------------------------------------------


def check_tiles(job: Job, plans: list[TiledPlan], out: torch.Tensor, samples: int = 6) -> tuple[float, float]:
    """Largest relative error of sampled tiles against float64 on the plan's own pages, and plain
    bfloat16's error on the same keys."""
    worst, plain = 0.0, 0.0
    size, config, layout = job.tile, job.config, job.layout
    tiles = job.stop // size
    for sample in range(samples):
        tile = tiles - 1 - sample * (tiles // samples)
        stream = (sample * 3) % STREAMS
        rows = slice(tile * size, (tile + 1) * size)
        first = closed_chunks(tile * size, config, size) * config.chunk_size
        q = job.queries[stream, :, rows].double()
        k, v = (x[stream, first : rows.stop] for x in (job.near_keys, job.near_values))
        row = torch.arange(size, device=q.device)
        key = torch.arange(first, rows.stop, device=q.device)
        visible = key[None] <= (row + rows.start)[:, None]
        for plan in plans:
            index = tile - plan.start // size
            if layout is None or not 0 <= index < plan.counts.shape[1]:
                continue
            entries = plan.entries[stream, index, : plan.counts[stream, index]]  # type: ignore[index]
            slot = torch.arange(config.page_size, device=q.device)
            slots = (entries.long() // ENTRY * config.page_size)[:, None] + slot
            k = torch.cat((k, layout.keys[stream, slots.flatten()]))
            v = torch.cat((v, layout.values[stream, slots.flatten()]))
            seen = (row[:, None] >= entries % ENTRY).repeat_interleave(config.page_size, 1)
            visible = torch.cat((visible, seen), 1)
        exact, rough = (
            torch.nn.functional.scaled_dot_product_attention(
                q.to(t), k.to(t).expand(HEADS, -1, -1), v.to(t).expand(HEADS, -1, -1), visible
            ).double()
            for t in (torch.float64, torch.bfloat16)
        )
        got = out[stream, :, rows].double()
        worst = max(worst, float((got - exact).norm() / exact.norm()))
        plain = max(plain, float((rough - exact).norm() / exact.norm()))
    if not worst <= 1.5 * plain + 1e-3:
        raise SystemExit(f"wrong answer: error {worst:.2e}, plain bfloat16 {plain:.2e}")
    return worst, plain


def check_selection(job: Job, plans: list[TiledPlan], theta: float) -> float:
    """Share of decisions of sampled tiles that differ from float32 selection from the same moments.

    A page whose share is within 10% of θ may differ; any other difference ends the program.
    """
    config, layout, size = job.config, job.layout, job.tile
    differing = decisions = 0
    assert layout is not None
    for plan in plans:
        for index in (0, plan.counts.shape[1] // 2, plan.counts.shape[1] - 1):
            tile = plan.start // size + index
            closed = closed_chunks(tile * size, config, size)
            if not closed:
                continue
            stream = index % STREAMS
            rows = slice(tile * size, (tile + 1) * size, size // job.slots)
            balls = closed * config.pages_per_chunk * config.balls_per_page
            q = job.queries[stream, :, rows].float() * job.scale
            scorer = Scorer(1.0, config.alpha)
            one = slice(stream, stream + 1)
            moments = Moments(
                layout.moments.mean[one, :balls], layout.moments.variance[one, :balls], config.ball_size
            )
            scores = scorer(q, moments).unflatten(-1, (-1, config.balls_per_page)).logsumexp(-1)
            summed = scores
            if config.coarse_totals:
                summed = scorer(q, merge_moments(moments, config.balls_per_page * config.coarse_fan))
            first = closed * config.chunk_size
            key = torch.arange(first, tile * size + size, device=q.device)
            near = q @ job.near_keys[stream, first : tile * size + size].float().T
            position = torch.arange(rows.start, rows.stop, rows.step, device=q.device)
            near = near.masked_fill(key[None] > position[:, None], -math.inf)
            total = torch.cat((summed, near), -1).logsumexp(-1, keepdim=True)
            share = (scores - total).amax((0, 1))  # over heads and rows
            wanted = share > math.log(theta)
            wanted[layout.sink_pages(config.page_size)[stream]] = True
            got = torch.zeros_like(wanted)
            entries = plan.entries[stream, index, : plan.counts[stream, index]]  # type: ignore[index]
            got[entries.long() // ENTRY] = True
            clear = (share - math.log(theta)).abs() > 0.1
            if bool(((got != wanted) & clear).any()):
                raise SystemExit(f"wrong pages in tile {tile} of stream {stream}")
            differing += int((got != wanted).sum())
            decisions += int(wanted.sum())
    return differing / max(1, decisions)


# --- rivals -----------------------------------------------------------------------------------


def dense_call(data: Data, backend: SDPBackend) -> Callable[[], torch.Tensor]:
    length = data.keys.shape[1]
    q = data.queries.view(1, STREAMS * HEADS, length, DIM)
    k, v = (x.view(1, STREAMS, length, DIM) for x in (data.keys, data.values))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def flex_call(job: Job, plans: list[TiledPlan]) -> Callable[[], torch.Tensor]:
    """FlexAttention on the same pages: tree-ordered far keys, then all keys in order of position."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    config, layout, size, page = job.config, job.layout, job.tile, job.config.page_size
    assert layout is not None
    device, length = job.queries.device, job.stop
    far_keys = layout.keys.shape[1]
    tiles, far_pages, near_pages = length // size, far_keys // page, -(-length // page)
    full = torch.zeros(STREAMS, tiles, far_pages + near_pages, dtype=torch.int32, device=device)
    full_count = torch.zeros(STREAMS, tiles, dtype=torch.int32, device=device)
    for plan in plans:
        at = slice(plan.start // size, plan.start // size + plan.counts.shape[1])
        entries = plan.entries
        assert entries is not None
        listed = torch.arange(entries.shape[-1], device=device) < plan.counts[..., None]
        full[:, at, : entries.shape[-1]] = (entries // ENTRY).where(listed, 0)
        full_count[:, at] = plan.counts
    # Near pages that lie before the tile are full, those with the diagonal are partial.
    anchor = torch.arange(tiles, device=device) * size
    first = (anchor - config.window).clamp_min(0) // config.chunk_size * config.chunk_size
    whole = (anchor - first) // page
    most = int(whole.max())
    step = torch.arange(most, device=device)
    spot = full_count[..., None].long() + step
    near = (far_pages + first // page)[:, None] + step
    for stream in range(STREAMS):
        tile, j = torch.nonzero(step < whole[:, None], as_tuple=True)
        full[stream, tile, spot[stream, tile, j]] = near[tile, j].int()
    full_count += whole.int()
    partial = torch.zeros(1, 1, tiles, far_pages + near_pages, dtype=torch.int32, device=device)
    begin, end = first // page + whole, (anchor + size - 1) // page
    spans = int((end - begin + 1).max())
    partial[0, 0, :, :spans] = (far_pages + begin[:, None] + torch.arange(spans, device=device)).int()
    partial_count = (end - begin + 1).int()[None, None]

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv - far_keys <= q

    mask = BlockMask.from_kv_blocks(
        partial_count.expand(STREAMS, -1, -1).contiguous(),
        partial.expand(STREAMS, -1, -1, -1),
        full_count[:, None],
        full[:, None],
        BLOCK_SIZE=(size, page),
        mask_mod=visible,
        seq_lengths=(length, far_keys + near_pages * page),
        compute_q_blocks=False,
    )
    pad = near_pages * page - length
    keys, values = (
        torch.cat((a, torch.nn.functional.pad(b, (0, 0, 0, pad))), 1)[:, None]
        for a, b in ((layout.keys, job.near_keys), (layout.values, job.near_values))
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_M": min(size, 128), "BLOCK_N": min(page, 128)}

    def call() -> torch.Tensor:
        return compiled(job.queries, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)

    return call


# --- the sweep --------------------------------------------------------------------------------


class Table:
    """Rows of the CSV, printed as they come."""

    def __init__(self, path: Path) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.common = {
            "date": datetime.date.today().isoformat(),
            "gpu": properties.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        self.path, self.rows = path, list[dict[str, object]]()

    def add(self, setting: dict[str, object], part: str, ms: tuple[float, ...], **more: Any) -> None:
        pairs = more.pop("pairs", None)
        row = self.common | setting | {"part": part}
        row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), (f"{t:.4f}" for t in ms), strict=True))
        row |= {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in more.items()}
        rate = ""
        if pairs is not None:
            flops = pairs * STREAMS * HEADS * 4 * DIM
            row |= {"flops": f"{flops:.4g}", "tflops": f"{flops / ms[1] / 1e9:.0f}"}
            rate = f"{flops / ms[1] / 1e9:7.0f} TFLOP/s"
        self.rows.append(row)
        shown = " ".join(f"{k}={v}" for k, v in setting.items())
        notes = " ".join(f"{k}={row[k]}" for k in more)
        print(f"{shown:52s} {part:22s} {ms[1]:10.3f} ms {rate} {notes}", flush=True)

    def write(self) -> None:
        names = list(dict.fromkeys(itertools.chain.from_iterable(self.rows)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def parts(
    table: Table, data: Data, config: SurgeryConfig, density: float, dense_ms: float, flex: bool
) -> None:
    """Time every part for one setting."""
    length = data.keys.shape[1]
    setting: dict[str, object] = {
        "n": length,
        "page": config.page_size,
        "tile": config.tile,
        "ball": config.ball_size,
        "stride": config.score_stride,
        "totals": "coarse" if config.coarse_totals else "fine",
        "far": density,
    }
    layout = build_layout(data.keys, data.values, config)
    job = make_job(data.queries, data.keys, data.values, layout, config=config, start=0)
    strips = list(job.strips())
    far = [strip for strip in strips if strip.pages]
    totals = [prefill.row_totals(job, strip) for strip in far]
    theta = calibrate(job, totals, density)
    config = dataclasses.replace(config, theta=theta, theta_decode=theta)
    job = dataclasses.replace(job, config=config)
    plans = [prefill.list_pages(job, s, t) for s, t in zip(far, totals, strict=True)]
    out = torch.full_like(data.queries, math.nan)
    lse = torch.full(out.shape[:3], math.nan, device=out.device)

    def run(plans: list[TiledPlan], near: bool = True, far: bool = True) -> None:
        left = iter(plans)
        for strip in strips:
            plan = next(left) if strip.pages else None
            if near or plan is not None:
                prefill.attend_strip(job, strip, plan if far else None, out, lse, near=near)

    counts = torch.cat([p.counts.flatten() for p in plans]).float()
    executed = executed_density(plans, config.page_size, length)
    visible = sum(int(p.visible_pairs(config.page_size).sum()) for p in plans)
    whole = prefill.attend(data.queries, data.keys, data.values, layout, config=config, start=0)
    near_pairs, far_pairs = whole.near_pairs, int(executed * causal_pairs(length))
    differing = check_selection(job, plans, theta)
    error, plain = check_tiles(job, plans, whole.out)
    if torch.isnan(whole.out).any() or torch.isnan(whole.lse).any():
        raise SystemExit("NaN in the output")
    run(plans)
    check_tiles(job, plans, out)
    facts = {
        "theta": theta,
        "executed_far": executed,
        "visible_far": visible / STREAMS / causal_pairs(length),
        "total_density": (near_pairs + far_pairs) / causal_pairs(length),
        "pages_p50": float(counts.median()),
        "pages_p95": float(counts.sort().values[int(0.95 * (len(counts) - 1))]),
        "error": error,
        "plain_error": plain,
        "differing": differing,
    }
    table.add(setting, "layout", measure(lambda: build_layout(data.keys, data.values, config)))
    table.add(
        setting,
        "features",
        measure(lambda: make_levels(layout.moments, config, data.keys.dtype)),
    )
    for name, options in (("near", {"far": False}), ("pages", {"near": False}), ("", {})):
        part = f"totals {name}".strip()

        def totals_call(options: dict[str, bool] = options) -> None:
            for strip in far:
                prefill.row_totals(job, strip, **options)

        table.add(setting, part, measure(totals_call))

    def list_call() -> None:
        for strip, total in zip(far, totals, strict=True):
            prefill.list_pages(job, strip, total)

    table.add(setting, "lists", measure(list_call))
    table.add(setting, "near field", measure(lambda: run(plans, far=False)), pairs=near_pairs)
    table.add(setting, "far pages", measure(lambda: run(plans, near=False)), pairs=far_pairs)
    table.add(setting, "near + far", measure(lambda: run(plans)), pairs=near_pairs + far_pairs)
    shuffled = random_plans(job, plans, density)
    run(shuffled)
    check_tiles(job, shuffled, out)
    pairs = int(executed_density(shuffled, config.page_size, length) * causal_pairs(length))
    table.add(setting, "far pages, random", measure(lambda: run(shuffled, near=False)), pairs=pairs)

    def attend_call() -> object:
        return prefill.attend(data.queries, data.keys, data.values, layout, config=config, start=0)

    attend_ms = measure(attend_call)
    table.add(setting, "attend", attend_ms, **facts, speedup=dense_ms / attend_ms[1])

    def everything() -> object:
        fresh = build_layout(data.keys, data.values, config)
        return prefill.attend(data.queries, data.keys, data.values, fresh, config=config, start=0)

    everything_ms = measure(everything)
    table.add(setting, "attend with layout", everything_ms, speedup=dense_ms / everything_ms[1])
    if flex:
        try:
            call = flex_call(job, plans)
            check_tiles_loosely(job, plans, call())
            flex_ms = measure(call)
            table.add(setting, "FlexAttention", flex_ms, pairs=near_pairs + far_pairs)
        except Exception as problem:  # a rival that does not run must not end the sweep
            print(f"FlexAttention did not run: {str(problem).splitlines()[0][:200]}")


def check_tiles_loosely(job: Job, plans: list[TiledPlan], out: torch.Tensor) -> None:
    """FlexAttention has no first-open rows: compare with a plan where every page is open at once."""
    opened = [
        dataclasses.replace(p, entries=p.entries // ENTRY * ENTRY)  # type: ignore[operator]
        for p in plans
    ]
    check_tiles(job, opened, out)


def settings(length: int, full: bool) -> Iterator[tuple[SurgeryConfig, float, bool]]:
    """Configurations, far densities and whether FlexAttention runs, the most telling first."""

    def config(
        page: int, ball: int, tile: int = 32, stride: int = 1, coarse_totals: bool = False
    ) -> SurgeryConfig:
        return SurgeryConfig(
            page_size=page,
            moment_size=ball,
            tile=tile,
            score_stride=stride,
            coarse_totals=coarse_totals,
            theta_decode=0.01,
        )

    # FlexAttention on these pages ended in an illegal memory access at 128k (PyTorch 2.11).
    small = length <= 1 << 16
    yield config(64, 64, coarse_totals=True), 0.05, small
    if length == 1 << 15:
        yield config(64, 64, coarse_totals=True), 0.07, False
    if length >= 1 << 15:
        yield config(64, 64, coarse_totals=True), 0.01, False
    yield config(64, 64), 0.05, False
    yield config(64, 16), 0.05, False
    yield config(64, 64, stride=4), 0.05, False
    if full or length in (1 << 15, 1 << 17):
        yield config(32, 32), 0.05, False
        yield config(128, 128), 0.05, False
        yield config(64, 64, tile=16), 0.05, False
        yield config(64, 64, tile=64), 0.05, False


def sweep(lengths: list[int], seconds: float, full: bool, path: Path) -> None:
    device, begin = torch.device("cuda"), time.perf_counter()
    table = Table(path)
    print(table.common)
    try:
        for length in lengths:
            data = make_data(length, device)
            dense = {}
            for name, backend in (
                ("cuDNN", SDPBackend.CUDNN_ATTENTION),
                ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
            ):
                try:
                    dense[name] = measure(dense_call(data, backend))
                except RuntimeError as problem:
                    print(f"{name} did not run: {str(problem).splitlines()[0][:200]}")
                    continue
                table.add({"n": length}, name, dense[name], pairs=causal_pairs(length))
            fastest = min((ms[1] for ms in dense.values()), default=math.nan)
            for config, density, flex in settings(length, full):
                if time.perf_counter() - begin > seconds:
                    print(f"out of time at {length}: {config.page_size=} {config.tile=} not run")
                    continue
                parts(table, data, config, density, fastest, flex)
                table.write()
                torch.cuda.empty_cache()
    finally:
        print(f"{len(table.rows)} rows in {path}, {time.perf_counter() - begin:.0f} s")


def tune(length: int, seconds: float) -> None:
    """Times launch configurations of attention and of selection on one plan; prints the best."""
    begin = time.perf_counter()
    data = make_data(length, torch.device("cuda"))
    config = SurgeryConfig(score_stride=8, theta_decode=0.01)
    layout = build_layout(data.keys, data.values, config)
    job = make_job(data.queries, data.keys, data.values, layout, config=config, start=0)
    far = [strip for strip in job.strips() if strip.pages]
    theta = calibrate(job, [prefill.row_totals(job, s) for s in far], 0.05)
    job = dataclasses.replace(job, config=dataclasses.replace(config, theta=theta, theta_decode=theta))
    strip = far[-1]
    totals = prefill.row_totals(job, strip)
    plan = prefill.list_pages(job, strip, totals)
    out = torch.empty_like(data.queries)
    lse = torch.empty(out.shape[:3], device=out.device)
    attend = {
        "rows": (128, 64),
        "attend_warps": (8, 4),
        "attend_stages": (3, 2, 4),
        "keys_per_step": (64, 128),
        "block_near": (64, 128),
    }
    score = {
        "score_rows": (128, 64),
        "score_warps": (8, 4),
        "score_stages": (3, 2, 1, 4),
        "block_balls": (64, 32, 128),
    }
    found: list[tuple[float, str, Tuning]] = []
    for kind, grid in (("attend", attend), ("score", score)):
        for values in itertools.product(*grid.values()):
            if time.perf_counter() - begin > seconds * (0.55 if kind == "attend" else 1.0):
                print(f"{kind}: out of time")
                break
            tuning = dataclasses.replace(job.tuning, **dict(zip(grid, values, strict=True)))
            tried = dataclasses.replace(job, tuning=tuning)
            label = " ".join(f"{k}={v}" for k, v in zip(grid, values, strict=True))
            try:
                if kind == "attend":
                    near, far_ms = (
                        measure(
                            lambda t=tried, p=p, n=n: prefill.attend_strip(t, strip, p, out, lse, near=n),
                            60,
                        )[1]
                        for p, n in ((None, True), (plan, False))
                    )
                else:
                    near = measure(lambda t=tried: prefill.row_totals(t, strip), 60)[1]
                    far_ms = measure(lambda t=tried: prefill.list_pages(t, strip, totals), 60)[1]
            except Exception as problem:  # too much shared memory, say: the next may do
                print(f"{label}: {type(problem).__name__}")
                continue
            found.append((near + far_ms, f"{kind} {label}: {near:.3f} + {far_ms:.3f}", tuning))
            print(found[-1][1], flush=True)
    for kind in ("attend", "score"):
        print(*sorted(f for f in found if f[1].startswith(kind))[:4], sep="\n")


def parse_length(text: str) -> int:
    """``8k`` to 8192."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ["8k", "32k", "128k", "16k", "64k", "256k", "512k"]
    parser.add_argument("--lengths", nargs="+", default=default)
    parser.add_argument("--seconds", type=float, default=400.0, help="no new setting after this")
    parser.add_argument("--full", action="store_true", help="all page sizes and tiles everywhere")
    parser.add_argument("--tune", action="store_true", help="sweep launch configurations instead")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    lengths = [parse_length(text) for text in given.lengths]
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: PyTorch sees none.")
    if given.tune:
        tune(lengths[0], given.seconds)
    else:
        sweep(lengths, given.seconds, given.full, given.output)


if __name__ == "__main__":
    main()
