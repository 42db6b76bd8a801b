"""Losses of operated models at equal executed far density: what comparisons of ideas are made of."""

import dataclasses
import math

import numpy as np
import torch

from llama_surgery import SurgeryConfig, config_of, reset_statistics, statistics
from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.perplexity import Perplexity, token_nll
from llama_surgery.surgery.operation import set_config
from llama_surgery.surgery.statistics import Statistics
from llama_surgery.surgery.supported import inner_model

#: Executed far density may differ from what is asked by this share.
TOLERANCE = 0.01
#: Passes over the windows at most, until the density is met.
PASSES = 6
#: log θ against log density before two points are known.
FIRST_SLOPE = -1.2


@torch.no_grad()
def losses_of(model: torch.nn.Module, ids: torch.Tensor, batch: int, head: Head | None = None) -> Perplexity:
    """Losses of every token of (windows, length) ids, ``batch`` windows at a time.

    Without ``head`` one is made here, which takes a pass over a few tokens that is counted like any other.

    A plain PyTorch executor at these sizes waits for launches: several windows cost hardly more than one.
    """
    inner = inner_model(model)
    head, decoder = head or Head(model, ids[0]), inner.get_decoder()
    losses = []
    for part in ids.split(batch):
        states = decoder(input_ids=part.to(inner.device), use_cache=False).last_hidden_state
        losses += [token_nll(head, one, window) for one, window in zip(states, part, strict=True)]
    return Perplexity(torch.stack(losses), [])


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses of an operated model, what it read, and the configuration it ran with."""

    losses: Perplexity
    read: Statistics
    config: SurgeryConfig


def matched(model: torch.nn.Module, ids: torch.Tensor, batch: int, density: float) -> Measured:
    """Losses of an operated model with θ moved until the executed far density is ``density``.

    θ is set on the measured windows themselves, for everything that is compared alike: it is one number, and
    what is compared is then compared at what was really read. Thresholds of decode steps are left alone.
    """
    points: list[tuple[float, float]] = []
    for _ in range(PASSES):
        config = config_of(model)
        reset_statistics(model)
        losses, read = losses_of(model, ids, batch), statistics(model)
        if abs(read.far_density / density - 1) <= TOLERANCE:
            break
        points.append((math.log(config.theta), math.log(max(read.far_density, 1e-6))))
        theta = math.exp(_next(points, math.log(density)))
        decode = theta if config.tile == 1 else config.theta_decode
        set_config(model, dataclasses.replace(config, theta=theta, theta_decode=decode))
    return Measured(losses, read, config)


def _next(points: list[tuple[float, float]], wanted: float) -> float:
    """log θ of the next try: along the line through the last two points, (log θ, log density)."""
    theta, density = points[-1]
    slope = FIRST_SLOPE
    if len(points) > 1 and points[-2][1] != density:
        secant = (theta - points[-2][0]) / (density - points[-2][1])
        slope = secant if -4 < secant < -0.2 else FIRST_SLOPE
    return theta + slope * (wanted - density)


def gap_closed(dense: Perplexity, default: Perplexity, learned: Perplexity) -> tuple[float, float, float]:
    """Share of the gap in mean loss between default and dense that ``learned`` closes: 1 is all of it.

    Returns:
        The share, and its 95% interval by a paired bootstrap over windows (percentiles).
    """
    d, b, o = (np.asarray(x.per_window) for x in (dense, default, learned))
    picks = np.random.default_rng(0).integers(0, len(d), size=(10_000, len(d)))
    shares = 1 - (o - d)[picks].mean(1) / (b - d)[picks].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(1 - (o - d).mean() / (b - d).mean()), float(low), float(high)
