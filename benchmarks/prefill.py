"""Times every part of sparse prefill attention by itself, beside dense rivals, and writes a CSV.

    python benchmarks/prefill.py --lengths 32k 128k --seconds 400
    python benchmarks/prefill.py --growth --lengths 32k 128k 512k
    python benchmarks/prefill.py --tune --seconds 100
    python benchmarks/prefill.py --profile

The defaults are timed, for groups of 4, 7 and 5 query heads a KV head (--groups); the parts alone and
FlexAttention for the first group. What is timed and checked: ``timing/prefill.py``. ``--growth`` keeps the
number of pages that a tile reads, instead of the density, the same at all lengths. ``--tune`` sweeps launch
configurations instead, ``--profile`` prints the time of each kernel of a call.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing.measure import Deadline, say, times
from timing.plot import plot_prefill
from timing.prefill import Setting, bench_prefill
from timing.prefill_case import Data, calibrate, call_of, make_data, outputs_of
from timing.quantities import quantiles

from llama_surgery.attention.impl.triton.job import Job, make_job
from llama_surgery.attention.impl.triton.layout import launch as layout_module
from llama_surgery.attention.impl.triton.layout.launch import build_layout
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.select import launch as selection
from llama_surgery.attention.impl.triton.tuning import TABLE
from llama_surgery.config import SurgeryConfig
from llama_surgery.text import parse_length
from llama_surgery.topology.geometry import causal_pairs, near_pairs, summary_density

RESULTS = Path(__file__).parent / "results" / "attention.csv"
CUDA = torch.device("cuda")

#: Whose pages and tiles are timed.
DEFAULT = SurgeryConfig()

#: KV heads, and query heads of each: of Llama 8B, Qwen2.5-7B and Qwen2.5-14B.
GROUPS = {4: (8, 4), 7: (4, 7), 5: (8, 5)}

#: Far densities that θ is set for, and the total density that it is set for at 32k, where all costs meet.
DENSITIES, TOTAL = (0.05, 0.03), 0.10

#: Pages that a tile reads on average at every length, with ``--growth``.
PAGES = 96


def settings(length: int, *, parts: bool, growth: bool, flex: bool) -> Iterator[Setting]:
    """What is timed at a length, the most telling first; ``parts``: every part alone too."""
    if growth:
        yield Setting(DEFAULT, 2 * PAGES * DEFAULT.page_size / length, parts=parts)
        return
    for density in DENSITIES:
        yield Setting(DEFAULT, density, flex=flex and density == DENSITIES[0], parts=parts)
    if length == 1 << 15:
        near = near_pairs(0, length, DEFAULT, DEFAULT.tile) / causal_pairs(0, length)
        yield Setting(DEFAULT, TOTAL - near - summary_density(DEFAULT, length))


def _job(data: Data, density: float) -> Job:
    """A call in which θ is set for a density."""
    layout = build_layout(data.keys, data.values, DEFAULT)
    job = make_job(call_of(DEFAULT), data.queries, data.keys, data.values, layout, start=0)
    theta = calibrate(job, density)
    return dataclasses.replace(job, config=dataclasses.replace(DEFAULT, theta=theta, theta_decode=theta))


def tune(length: int, seconds: float) -> None:
    """Times launch configurations of layout and of the portable kernels; prints the best."""
    deadline, data = Deadline(seconds), make_data(length, CUDA, torch.bfloat16)
    job = _job(data, 0.05)
    job = dataclasses.replace(job, tuning=dataclasses.replace(job.tuning, specialised=False))
    strip = list(job.strips())[-1]
    out, lse = outputs_of(job)
    plan = selection.select(job, strip, out, lse)
    calls: dict[str, Callable[[Job], object]] = {
        "selection": lambda job: selection.select(job, strip, out, lse),
        "near": lambda job: prefill.attend_strip(job, strip, None, out, lse),
        "near and far": lambda job: prefill.attend_strip(job, strip, plan, out, lse),
    }
    fine = dataclasses.replace(DEFAULT, page_size=16)
    for config, place in ((DEFAULT, 0), (fine, 1)):
        kept = layout_module.PROJECT_WARPS
        for warps in (1, 2, 4) if place else (4, 8):
            layout_module.PROJECT_WARPS = (warps, kept[1]) if place == 0 else (kept[0], warps)
            milliseconds = _middle(lambda config=config: build_layout(data.keys, data.values, config))
            say(f"layout, pages of {config.page_size}: {milliseconds:.3f} ms with {warps} warps")
        layout_module.PROJECT_WARPS = kept
    grids: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {
        ("selection",): {
            "score_stages": (2, 3),
            "score_warps": (4, 8),
            "score_rows": (64, 128),
            "block_pages": (32, 64),
        },
        ("near", "near and far"): {
            "attend_stages": (2, 3),
            "block_near": (64, 128),
        },
    }
    for names, grid in grids.items():
        found: dict[str, list[tuple[float, str]]] = {name: [] for name in names}
        for values in itertools.product(*grid.values()):
            if deadline.spent > seconds:
                break
            change = dict(zip(grid, values, strict=True))
            tried = dataclasses.replace(job, tuning=dataclasses.replace(job.tuning, **change))
            for name in names:
                milliseconds = _middle(lambda name=name, job=tried: calls[name](job))
                found[name].append((milliseconds, str(change)))
        for name in names:
            for milliseconds, change in sorted(found[name])[:3]:
                say(f"{name} {milliseconds:.3f} ms {change}")


def _middle(call: Callable[[], object]) -> float:
    try:
        call()
        return quantiles(times(call, CUDA, 5))["p50_ms"]
    except Exception:  # too much shared memory, say: the next may do
        return float("inf")


def profile(length: int) -> None:
    """Time of each kernel of layout, selection and attention."""
    data = make_data(length, CUDA, torch.bfloat16)
    job = _job(data, 0.05)

    def call() -> None:
        layout = build_layout(data.keys, data.values, job.config)
        prefill.attend(call_of(job.config), data.queries, data.keys, data.values, layout, start=0)

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    for event in sorted(profiler.events(), key=lambda event: -event.device_time)[:20]:
        say(f"{event.name[:60]:60s} {event.device_time / 1e3:8.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = ["32k", "128k", "8k", "16k", "64k"]
    parser.add_argument("--lengths", nargs="+", default=default)
    parser.add_argument("--seconds", type=float, default=400.0, help="no new setting after this")
    parser.add_argument("--groups", nargs="+", type=int, choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--growth", action="store_true", help="equally many pages a tile at every length")
    parser.add_argument("--without-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--tune", action="store_true", help="sweep launch configurations instead")
    parser.add_argument("--profile", action="store_true", help="time of each kernel instead")
    parser.add_argument("--portable", action="store_true", help="only kernels that run on any GPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    lengths = [parse_length(text) for text in given.lengths]
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: PyTorch sees none.")
    if given.portable:
        for family, tuning in TABLE.items():
            TABLE[family] = dataclasses.replace(tuning, specialised=False)
    if given.tune:
        tune(lengths[0], given.seconds)
    elif given.profile:
        profile(lengths[0])
    else:
        deadline = Deadline(given.seconds)

        first = GROUPS[given.groups[0]]

        def asked(length: int, shape: tuple[int, int] | None) -> Iterator[Setting]:
            flex = shape == first and not given.without_flex
            return settings(length, parts=shape == first, growth=given.growth, flex=flex)

        cases = [(length, GROUPS[group]) for length in lengths for group in given.groups]
        rows = bench_prefill(cases, asked, given.output, deadline=deadline, device=CUDA)
        plot_prefill([r for r in rows if r.get("far", 0.05) == 0.05], given.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
