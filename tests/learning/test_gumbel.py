"""The preprint's router: dense at the start, and executed with the mask it was trained with."""

import dataclasses

import pytest
import torch
from tests.surgery.tiny import build, llama, logits, tokens

from llama_surgery import SurgeryError
from llama_surgery.learning.gumbel import (
    Gumbel,
    GumbelSettings,
    expected_distance,
    gumbel_digits,
    gumbel_for,
    gumbel_in,
    learn_gumbel,
    load_balance,
)
from llama_surgery.topology.router import content_distance, content_mask, levels_for

SETTINGS = GumbelSettings(length=128, steps=6, window=8, rate=0.05)


def random_routers(model, arities: tuple[int, ...], seed: int = 0) -> Gumbel:
    gumbel = gumbel_for(model, dataclasses.replace(SETTINGS, arities=arities, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in gumbel.routers.values():
            for projection in router.projections:
                projection.bias.zero_()
                projection.weight.normal_(0, 1, generator=generator)
    return gumbel


@pytest.mark.parametrize("arities", [(2,), (3,), (5,), (7,), (2, 4)])
def test_it_is_dense_at_step_0(arities) -> None:
    model, ids = llama(), tokens(96)
    gumbel = gumbel_for(model, dataclasses.replace(SETTINGS, arities=arities))
    with torch.no_grad(), gumbel_in(model, gumbel):
        ours = logits(model, ids, use_cache=False)
    torch.testing.assert_close(ours, logits(model, ids), rtol=0, atol=1e-9)
    assert gumbel.density() == 1.0


@pytest.mark.parametrize("arities", [(2,), (3,), (5,), (2, 4)])
def test_the_executed_mask_is_the_trained_one(arities) -> None:
    model, ids = llama(), tokens(96)
    gumbel, outs, densities = random_routers(model, arities), [], []
    for training in (True, False):
        gumbel.training, gumbel.generator = training, None  # no noise: the likeliest digits on both ways
        gumbel.reset()
        with torch.no_grad(), gumbel_in(model, gumbel):
            outs.append(logits(model, ids, use_cache=False))
        densities.append(gumbel.density())
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-9)
    assert densities[0] == densities[1] < 0.9


@pytest.mark.parametrize("arity", [2, 3, 5])
def test_distances_agree_with_a_slow_loop(arity: int) -> None:
    levels, n = 4, 24
    digits = torch.randint(arity, (n, levels), generator=torch.Generator().manual_seed(arity))
    one_hot = torch.nn.functional.one_hot(digits, arity).double()
    fast, soft = content_distance(digits, digits), expected_distance(one_hot, one_hot)
    mask = content_mask(digits, digits, torch.arange(n), torch.arange(n), 3, 2)
    for i in range(n):
        for j in range(n):
            shared = 0
            while shared < levels and digits[i, levels - 1 - shared] == digits[j, levels - 1 - shared]:
                shared += 1
            assert fast[i, j] == soft[i, j] == levels - shared
            assert bool(mask[i, j]) == (j <= i and (j == 0 or i - j < 3 or levels - shared <= 2))
    # An ultrametric: d(i, k) ≤ max(d(i, j), d(j, k)).
    assert (fast[:, None, :] <= torch.maximum(fast[:, :, None], fast[None])).all() and fast.max() > 0


def test_generation_sees_what_whole_windows_see() -> None:
    model, ids = llama(), tokens(60)
    gumbel = random_routers(model, (2,))
    with torch.no_grad(), gumbel_in(model, gumbel):
        out = model.generate(
            ids[None], attention_mask=torch.ones(1, 60, dtype=torch.int64), max_new_tokens=6, do_sample=False
        )
        whole = logits(model, out[0], use_cache=False)
    assert torch.equal(whole[0, 59:-1].argmax(-1), out[0, 60:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_runs_and_routers_leave_the_collapse(dtype) -> None:
    model, steps = build("Llama", dtype=dtype), []
    gumbel = learn_gumbel(model, tokens(4, 128), SETTINGS, steps.append)
    assert [step.step for step in steps] == list(range(1, 7))
    assert all(torch.isfinite(p).all() for p in gumbel.routers.parameters())
    assert all(step.loss == step.loss and 0 < step.density <= 1 for step in steps)
    assert steps[0].density > 0.98 and steps[-1].balance < steps[0].balance
    assert all(p.requires_grad for p in model.parameters())


def test_levels_and_balance() -> None:
    assert [levels_for(p, 8192) for p in (2, 3, 5)] == [13, 9, 6]
    even = torch.eye(4).repeat(8, 1)[None, None, :, None] * 50
    assert float(load_balance(even)) == pytest.approx(1.0)
    assert float(load_balance(torch.tensor([50.0, 0, 0, 0]).expand(1, 1, 9, 2, 4))) == pytest.approx(4.0)
    drawn = gumbel_digits(torch.zeros(1000, 3), 1.0, torch.Generator().manual_seed(0))
    assert (drawn.mean(0) - 1 / 3).abs().max() < 0.06


def test_arities_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SurgeryError, match="arities"):
        gumbel_for(llama(), dataclasses.replace(SETTINGS, arities=(2, 3, 5)))
