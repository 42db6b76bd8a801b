"""Times what learned corrections and summaries cost the kernels of one layer, and writes a CSV.

python -m benchmarks.corrections --length 32k
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing.measure import Deadline, Rows, graphed, times
from benchmarks.timing.prefill_case import (
    DIM,
    HEADS,
    STREAMS,
    Data,
    calibrate,
    call_of,
    executed_density,
    make_data,
)
from benchmarks.timing.quantities import quantiles

from llama_surgery.attention import api
from llama_surgery.attention.impl.triton.decode.cache import DecodeCache, append_tokens
from llama_surgery.attention.impl.triton.decode.launch import DecodeResult, decode
from llama_surgery.attention.impl.triton.job import make_job
from llama_surgery.attention.impl.triton.layout.launch import build_layout
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.decoding import cache_view
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.text import parse_length
from llama_surgery.topology.router import PageRouter

RESULTS = Path(__file__).parent / "results" / "corrections.csv"

#: What is timed: changes of the configuration, and which corrections there are.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "budgets": ({}, ("offset",)),
    "channels": ({}, ("offset", "mean_weight", "variance_weight")),
    "tree": ({}, ("offset", "key_map")),
    "all": ({}, ("offset", "mean_weight", "variance_weight", "key_map")),
    "weights of summaries": ({}, ("summary",)),
    "no summaries": ({"summary": "none"}, ()),
}

#: Tokens of the texts that answers are checked on, and the relative error beyond which one is wrong.
CHECKED, TOLERANCE = 1600, 1e-3

#: Decode calls of one replay: a single one would be shorter than its launch.
CALLS = 20


def corrections(parts: tuple[str, ...], device: torch.device) -> PageRouter | None:
    """Corrections close to neutral, so that about the same pages are opened."""
    generator = torch.Generator(device).manual_seed(0)

    def near(value: float | torch.Tensor, *shape: int) -> torch.Tensor:
        return value + 0.05 * torch.randn(*shape, generator=generator, device=device)

    made = {
        "offset": near(0.0, STREAMS, HEADS),
        "mean_weight": near(1.0, STREAMS, HEADS, DIM),
        "variance_weight": near(1.0, STREAMS, HEADS, DIM),
        "key_map": near(torch.eye(DIM, device=device), STREAMS, DIM, DIM),
        "summary": near(0.0, STREAMS, HEADS),
    }
    return PageRouter(**{name: made[name] for name in parts}) if parts else None


def bench_corrections(
    config: SurgeryConfig,
    length: int,
    out: Path,
    *,
    density: float,
    deadline: Deadline,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:
    """Time layout, prefill and a decode step of every variant; rows are written as they are measured.

    θ of tiles is where the plain layer executes a far density of ``density``, θ of decode steps its default
    share of that. ``over_plain`` is the time over the plain layer's. Every variant is first checked against
    plain PyTorch, in float32 on a shorter text.

    Raises:
        SurgeryError: A wrong answer.
    """
    rows = Rows(out, device, n=length, dtype=str(dtype).split(".")[-1])
    data, few = make_data(length, device, dtype), make_data(CHECKED, device, torch.float32)
    job = make_job(call_of(config), *_states(data), _layout(data, config, None), start=0)
    theta = calibrate(job, density)
    config = dataclasses.replace(config, theta=theta, theta_decode=theta / 4)
    plain: dict[str, float] = {}
    for name, (change, parts) in VARIANTS.items():
        if deadline.passed(name):
            break
        rule, router = dataclasses.replace(config, **change), corrections(parts, device)
        error = check(few, rule, router)
        for part, (found, facts) in _timed(data, rule, router, device).items():
            middle = found["p50_ms"]
            over = middle / plain.setdefault(part, middle)
            rows.add(variant=name, part=part, **found, over_plain=over, error=error, **facts)
    return rows.rows


def check(data: Data, config: SurgeryConfig, router: PageRouter | None) -> float:
    """Largest relative error of prefill and of a decode step against plain PyTorch.

    Raises:
        SurgeryError: It is beyond TOLERANCE.
    """
    layout = _layout(data, config, router)
    result = prefill.attend(call_of(config, router), *_states(data), layout, start=0)
    oracle = dataclasses.replace(config, backend="gather")
    expected = api.attend(*_states(data), layout, config=oracle, start=0, router=router)
    step = _decode(data, _cache(data, config, router), router)
    last = data.queries.shape[2] - 1
    wanted = api.attend(
        data.queries[:, :, last:], data.keys, data.values, layout,
        config=oracle, start=last, tile=1, router=router,
    )  # fmt: skip
    pairs = ((result.out, expected.out), (step.out, wanted.out))
    worst = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    if not worst <= TOLERANCE:
        raise SurgeryError(f"wrong answer: relative error {worst:.2e} with {config} and {router}")
    return worst


def _timed(
    data: Data, config: SurgeryConfig, router: PageRouter | None, device: torch.device
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Quantiles of milliseconds, and densities, of every part."""
    layout, cache = _layout(data, config, router), _cache(data, config, router)
    count = 20 if device.type == "cuda" else 1

    def attend() -> AttentionResult:
        return prefill.attend(call_of(config, router), *_states(data), layout, start=0)

    plans, step = attend().plans, _decode(data, cache, router)
    replay = graphed(lambda: [_decode(data, cache, router) for _ in range(CALLS)], device)
    length = data.queries.shape[2]
    read = float(step.read.float().mean()) * config.page_size / length
    return {
        "layout": (quantiles(times(lambda: _layout(data, config, router), device, count)), {}),
        "prefill": (
            quantiles(times(attend, device, count)),
            {"executed_far": executed_density(plans, config.page_size, length)},
        ),
        "decode": (
            quantiles([ms / CALLS for ms in times(replay, device, count)]),
            {"executed_far": read},
        ),
    }


def _states(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return data.queries, data.keys, data.values


def _layout(data: Data, config: SurgeryConfig, router: PageRouter | None) -> Any:
    full = (data.keys.shape[1] - 1) // config.chunk_size * config.chunk_size
    return build_layout(data.keys[:, :full], data.values[:, :full], config, router)


def _cache(data: Data, config: SurgeryConfig, router: PageRouter | None) -> DecodeCache:
    """All but the last token settled, that one appended."""
    keys, values = data.keys, data.values
    config = dataclasses.replace(config, backend="triton")
    buffers = PageBuffers(config, STREAMS, keys.device)
    buffers.reserve(keys.shape[1])
    store = SequenceStore(config, buffers)
    store.append(keys[None, :, :-1], values[None, :, :-1], 0, router)
    lengths = torch.tensor([store.length], dtype=torch.int32, device=keys.device)
    cache = cache_view(buffers, config, STREAMS, lengths)
    append_tokens(cache, keys[:, -1:], values[:, -1:])
    return cache


def _decode(data: Data, cache: DecodeCache, router: PageRouter | None) -> DecodeResult:
    return decode(data.queries[:, :, -1:], cache, router=router)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=parse_length, default=1 << 15)
    parser.add_argument("--density", type=float, default=0.05, help="executed far density of the plain layer")
    parser.add_argument("--seconds", type=float, default=200.0, help="no new variant after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU: PyTorch sees none.")
    config, device = SurgeryConfig(), torch.device("cuda")
    deadline = Deadline(given.seconds)
    bench_corrections(
        config, given.length, given.output, density=given.density, deadline=deadline, device=device
    )


if __name__ == "__main__":
    main()
