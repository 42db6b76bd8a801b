"""Gates: dense at one end of the homotopy, the operated model at the other, and gradients between."""

import dataclasses
import math

import pytest
import torch
from tests.learning.in_memory import local_errors
from tests.surgery.tiny import SINGLE, SPARSE, llama, logits, tokens

from llama_surgery import operated, reset_statistics, statistics
from llama_surgery.learning.attach import Gates, gates_in
from llama_surgery.learning.corrections import Corrections, scorer_parameters
from llama_surgery.learning.gates import Homotopy
from llama_surgery.learning.reading import Reading

SHAPES = {0: (2, 2, 16), 1: (2, 2, 16)}
PARTS = ("channels", "tree", "summary")
BARE = dataclasses.replace(SPARSE, summary="none")


def corrections(seed: int, size: float = 0.3) -> Corrections:
    """Random corrections, so that every part matters."""
    made = Corrections.build(SHAPES, PARTS, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return made.double()


def gated(model, ids: torch.Tensor, gates: Gates) -> torch.Tensor:
    gates.mode = "gated"
    gates.reading = Reading()
    with gates_in(model, gates):
        return model(ids[None], use_cache=False).logits


@pytest.mark.parametrize(
    "config",
    [SPARSE, SINGLE, BARE, dataclasses.replace(SINGLE)],
)
def test_the_hard_end_is_the_operated_model(config) -> None:
    model, ids, learned = llama(), tokens(320), corrections(1)
    gates = Gates(learned, config, math.log(config.theta), Homotopy(1.0, 0.0))
    with torch.no_grad():
        ours = gated(model, ids, gates)
    with operated(model, config, routers=scorer_parameters(learned)):
        reset_statistics(model)
        theirs = logits(model, ids, use_cache=False)
        read = statistics(model)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert 0.01 < read.far_density < 0.6
    assert gates.reading.density() == pytest.approx(read.far_density, rel=1e-12)


@pytest.mark.parametrize("config", [SPARSE, BARE])
def test_the_soft_end_is_the_dense_model(config) -> None:
    model, ids = llama(), tokens(320)
    gates = Gates(corrections(2), config, math.log(0.3), Homotopy(0.0, 1.0))
    with torch.no_grad():
        torch.testing.assert_close(gated(model, ids, gates), logits(model, ids), rtol=0, atol=1e-9)
    assert gates.reading.mass_lost() > 0.01


@pytest.mark.parametrize("config", [SPARSE, BARE])
def test_falling_temperature_approaches_the_hard_end(config) -> None:
    model, ids, learned = llama(), tokens(256), corrections(3)
    ends = []
    for temperature in (1.0, 0.1, 0.001, 0.0):
        gates = Gates(learned, config, math.log(0.15), Homotopy(1.0, temperature))
        with torch.no_grad():
            ends.append((gated(model, ids, gates), float(gates.reading.soft_density())))
    errors = [(end[0] - ends[-1][0]).abs().max() for end in ends[:-1]]
    assert errors[2] < min(errors[:2])
    assert ends[2][1] == pytest.approx(ends[3][1], rel=0.01)


def test_every_parameter_moves_loss_and_density() -> None:
    model, ids, learned = llama(), tokens(256), corrections(4)
    gates = Gates(learned, SPARSE, math.log(0.15), Homotopy(1.0, 1.0))
    for objective in ("loss", "density"):
        out = gated(model, ids, gates)
        learned.zero_grad()
        (out.square().mean() if objective == "loss" else gates.reading.soft_density()).backward()
        for name, parameter in learned.named_parameters():
            moved = parameter.grad is not None and parameter.grad.abs().max() > 0
            assert moved or (objective, name) == ("density", "1.summary"), (objective, name)
    model.zero_grad()


@pytest.mark.parametrize("config", [SPARSE, BARE])
def test_open_gates_are_dense_and_their_gradients_are_numbers(config) -> None:
    model, ids, learned = llama(), tokens(256), corrections(5)
    out = gated(model, ids, Gates(learned, config, math.log(0.15), Homotopy(0.0, 0.5)))
    torch.testing.assert_close(out, logits(model, ids), rtol=0, atol=1e-9)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learned.parameters())


def test_slope_is_the_derivative_in_log_theta() -> None:
    model, ids, learned = llama(), tokens(256), corrections(5)
    densities, step = [], 1e-5
    for log_theta in (math.log(0.15) - step, math.log(0.15) + step):
        # A strength of zero keeps the hidden states, so that only the gates move.
        gates = Gates(learned, SPARSE, log_theta, Homotopy(0.0, 0.5))
        with torch.no_grad():
            gated(model, ids, gates)
        densities.append(float(gates.reading.soft_density()))
    measured = (densities[1] - densities[0]) / (2 * step)
    assert gates.reading.density_slope() == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(("layer", "name"), [("0", "offset"), ("1", "offset"), ("0", "summary")])
def test_gradients_are_finite_differences(layer: str, name: str) -> None:
    model, ids, learned = llama(), tokens(192), corrections(6)
    offset = getattr(learned[layer], name)
    gates = Gates(learned, SPARSE, math.log(0.15), Homotopy(1.0, 0.7))

    def loss() -> torch.Tensor:
        return gated(model, ids, gates).square().mean()

    learned.zero_grad()
    loss().backward()
    slope, step = float(offset.grad[0, 1]), 1e-6
    with torch.no_grad():
        offset[0, 1] += step
        high = loss()
        offset[0, 1] -= 2 * step
        low = loss()
    assert slope == pytest.approx(float(high - low) / (2 * step), rel=1e-4)
    model.zero_grad()


def test_local_errors_vanish_where_everything_is_open() -> None:
    model, ids, learned = llama(), tokens(256), corrections(7)
    errors = []
    for log_theta in (-60.0, math.log(0.3)):
        gates = Gates(learned, SPARSE, log_theta, Homotopy(1.0, 0.0))
        gates.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            errors.append(float(local_errors(model, ids[None], gates).mean()))
    assert errors[0] < 1e-18 < 1e-6 < errors[1]


def test_local_density_is_an_estimate_of_the_whole() -> None:
    model, ids, learned = llama(), tokens(256), corrections(8)
    densities = []
    for tiles in (1000, 3):
        gates = Gates(learned, SPARSE, math.log(0.15), Homotopy(1.0, 0.0), sampled_tiles=tiles)
        estimates = []
        for seed in range(8):
            gates.generator, gates.reading = torch.Generator().manual_seed(seed), Reading()
            with torch.no_grad():
                local_errors(model, ids[None], gates)
            estimates.append(gates.reading.density())
        densities.append(sum(estimates) / len(estimates))
    assert densities[1] == pytest.approx(densities[0], rel=0.1)
