"""Times decode attention over a paged cache beside dense rivals, in CUDA graphs, and writes a CSV.

    python benchmarks/decode.py --seconds 400
    python benchmarks/decode.py --tune --first 3 --seconds 200
    python benchmarks/decode.py --profile --first 3
    python benchmarks/decode.py --paged --output paged.csv

What is timed and checked: ``timing/decode.py``.
"""

import argparse
import dataclasses
import itertools
import math
from pathlib import Path

import torch
from timing.decode import PAGED_SETTINGS, SETTINGS, bench_decode, copies_for, measure
from timing.decode_case import Layer, Setting, build, check
from timing.measure import Deadline, capture
from timing.plot import plot_decode

from llama_surgery.attention.impl.triton.decode.launch import DecodeResult, decode
from llama_surgery.attention.impl.triton.decode.tuning import DecodeTuning, decode_tuning_for
from llama_surgery.attention.impl.triton.tuning import family_of

RESULTS = Path(__file__).parent / "results" / "decode.csv"
CUDA = torch.device("cuda")


def tune(setting: Setting, seconds: float) -> DecodeTuning:
    """Varies one field of the launch configuration at a time and keeps what is faster."""
    deadline = Deadline(seconds)
    layers, _ = build(setting, copies_for(setting, CUDA), CUDA, torch.bfloat16)
    best, fastest = decode_tuning_for(family_of(CUDA)), math.inf
    fields = {
        "programs": (2, 3, 4, 6, 8, 12),
        "open_stages": (1, 2, 3, 4),
        "open_warps": (1, 2, 4, 8),
        "score_warps": (1, 2, 4, 8),
        "score_stages": (1, 2, 3, 4),
        "step_bytes": (1 << 13, 1 << 14, 1 << 15, 1 << 16),
        "merge_parts": (32, 64, 128),
        "merge_warps": (4, 8),
        "most_steps": (4, 8, 16),
        "most_pages": (32, 64, 128, 256),
    }
    tried = set[DecodeTuning]()
    for name, values in itertools.chain(fields.items(), fields.items()):
        for value in values:
            tuning = dataclasses.replace(best, **{name: value})
            if tuning in tried or deadline.spent > seconds:
                continue
            tried.add(tuning)

            def call(layer: Layer, tuning: DecodeTuning = tuning) -> DecodeResult:
                return decode(layer.queries, layer.cache, tuning=tuning)

            try:
                check(setting, layers[0], call(layers[0]))
                middle = 1e3 * measure(layers, call, 100.0)["p50_ms"]
            except Exception as problem:  # too much shared memory, say: the next may do
                print(f"{name}={value}: {type(problem).__name__}")
                continue
            print(f"{setting.label} {name}={value}: {middle:.2f} us", flush=True)
            if middle < 0.99 * fastest:
                best, fastest = tuning, middle
    print(f"best of {len(tried)}: {fastest:.2f} us with {best}")
    return best


def profile(setting: Setting) -> None:
    """Mean time of each kernel of a call, caches not reused."""
    layers, _ = build(setting, copies_for(setting, CUDA), CUDA, torch.bfloat16)
    replay, _ = capture(lambda: [decode(x.queries, x.cache) for x in layers])
    replay()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(20):
            replay()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        print(f"{setting.label} {event.key[:40]:40s} {event.device_time:8.2f} us x {event.count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400.0, help="no new setting after this")
    parser.add_argument("--tune", action="store_true", help="sweep launch configurations instead")
    parser.add_argument("--profile", action="store_true", help="time of each kernel instead")
    parser.add_argument("--first", type=int, default=None, help="only so many settings, in order")
    parser.add_argument(
        "--paged", action="store_true", help="an engine's cache beside a contiguous one instead"
    )
    parser.add_argument("--without-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: PyTorch sees none.")
    chosen = (PAGED_SETTINGS if given.paged else SETTINGS)[: given.first]
    if given.tune:
        for setting in chosen:
            tune(setting, given.seconds / len(chosen))
            torch.cuda.empty_cache()
    elif given.profile:
        for setting in chosen:
            profile(setting)
            torch.cuda.empty_cache()
    else:
        deadline = Deadline(given.seconds)
        flex = not given.without_flex
        rows = bench_decode(chosen, given.output, deadline=deadline, device=CUDA, flex=flex)
        plot_decode(rows, given.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
