"""From which position on the sparse path is faster than the dense one, on this device: ``dense_until``."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_surgery.attention.api import attend
from llama_surgery.attention.executor import build_layout
from llama_surgery.attention.result import AttentionResult
from llama_surgery.bench.dense import fastest
from llama_surgery.bench.measure import Deadline, Rows, graphed, nearest_theta, times
from llama_surgery.bench.states import clustered_states
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import causal_pairs, near_pairs, summary_density

#: How near the density, as a share of it, is near enough.
NEAR = 0.05


class Heads(NamedTuple):
    """Attention heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int


class Point(NamedTuple):
    """Milliseconds of attention over a text of ``length`` tokens.

    Attributes:
        dense_ms: All rows dense, as rows below ``dense_until`` are executed.
        operated_ms: No row dense; layout and selection included.
        rival_ms: PyTorch's SDPA with the fastest of its backends.
    """

    length: int
    dense_ms: float
    operated_ms: float
    rival_ms: float


def recommend(points: Sequence[Point], tile: int) -> int:
    """``dense_until``: the smallest measured position after which every stretch costs less sparse than dense.

    Costs are those of the stretch between two lengths, since a row below ``dense_until`` is dense and one
    above is not, whatever the length of the text. Rounded up to a multiple of ``tile``. The largest measured
    length where the last stretch is still cheaper dense.
    """
    until, before = 0, Point(0, 0.0, 0.0, 0.0)
    for point in points:
        if point.operated_ms - before.operated_ms >= point.dense_ms - before.dense_ms:
            until = point.length
        before = point
    return -(-until // tile) * tile


def crossing(points: Sequence[Point]) -> int | None:
    """Where, beyond what was measured, a further token costs as much operated as dense.

    Lines through the costs per token of the last two stretches, in thousands of tokens; None where the dense
    cost does not gain on the other.
    """
    if len(points) < 3:
        return None
    rates = []
    for before, point in itertools.pairwise(points[-3:]):
        tokens = point.length - before.length
        costs = (point.operated_ms - before.operated_ms, point.dense_ms - before.dense_ms)
        rates.append(((before.length + point.length) / 2, (costs[0] - costs[1]) / tokens))
    (one, excess), (other, left) = rates
    if left >= excess:
        return None
    return round((other + left * (other - one) / (excess - left)) / 1000) * 1000


def measure_crossover(
    shape: Heads,
    config: SurgeryConfig,
    lengths: Sequence[int],
    density: float | None,
    out: Path,
    *,
    seconds: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[int, list[Point]]:
    """Measure attention of one layer at rising lengths, keys clustered as those of text are.

    Args:
        shape: Heads of the layer.
        config: The topology.
        lengths: Ascending.
        density: Executed far density at the largest length, for which θ is found; None to keep θ.
        out: CSV, written as lengths are measured.
        seconds: No further length begins after this many.

    Returns:
        ``dense_until`` and the measured points.

    Raises:
        SurgeryError: Not even one length was measured, or an answer is wrong.
    """
    deadline, rows, points = Deadline(seconds), Rows(out, device, **shape._asdict()), list[Point]()
    config = dataclasses.replace(config, dense_until=0)
    group = shape.heads // shape.kv_heads
    q, k, v = clustered_states(shape.kv_heads, group, lengths[-1], shape.head_dim, device, dtype)
    if density is not None:

        def measured(theta: float) -> float:
            tried = dataclasses.replace(config, theta=theta, theta_decode=theta)
            return _far_density(_attend(tried, q, k, v), tried)

        theta = nearest_theta(measured, density, f"at {lengths[-1]:,} tokens", near=NEAR)
        config = dataclasses.replace(config, theta=theta, theta_decode=theta)
    for length in lengths:
        if points and deadline.passed(f"{length} tokens"):
            break
        states = q[:, :, :length], k[:, :length], v[:, :length]
        _check(config, *states)
        way = fastest(states[0].flatten(0, 1)[None], states[1][None], states[2][None])[1]
        dense = _dense(config, length)
        measured = [_middle(functools.partial(_attend, c, *states), device) for c in (dense, config)]
        points.append(Point(length, *measured, min(way.values())))
        found = _attend(config, *states)
        far = _far_density(found, config)
        near = near_pairs(0, length, config, config.tile) / causal_pairs(0, length)
        rows.add(
            **points[-1]._asdict(), theta=config.theta, far_density=far,
            total_density=far + near + summary_density(config, length),
        )  # fmt: skip
    return recommend(points, config.tile), points


def _dense(config: SurgeryConfig, length: int) -> SurgeryConfig:
    return dataclasses.replace(config, dense_until=-(-length // config.tile) * config.tile)


def _attend(config: SurgeryConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionResult:
    full = q.shape[2] // config.chunk_size * config.chunk_size
    sparse = full and q.shape[2] > config.dense_until
    layout = build_layout(k[:, :full], v[:, :full], config) if sparse else None
    return attend(q, k, v, layout, config=config, start=0)


def _check(config: SurgeryConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """With everything open both paths must agree."""
    opened = dataclasses.replace(config, theta=0.0, theta_decode=0.0)
    rows = min(q.shape[2], 2048)
    part = q[:, :, :rows], k[:, :rows], v[:, :rows]
    one, other = (_attend(c, *part).out.float() for c in (opened, _dense(opened, rows)))
    error = float((one - other).norm() / other.norm())
    if not error < 0.02:
        raise SurgeryError(f"with everything open, sparse and dense attention differ by {error:.2e}.")


def _middle(run: Callable[[], Any], device: torch.device) -> float:
    run()
    return times(graphed(run, device), device, 5)[2]


def _far_density(result: AttentionResult, config: SurgeryConfig) -> float:
    pairs = sum(float(plan.executed_pairs(config.page_size).double().mean()) for plan in result.plans)
    return pairs / causal_pairs(0, result.out.shape[2])
