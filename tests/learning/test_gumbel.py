"""The preprint's router: dense at the start, and executed with the mask it was trained with."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from tests.learning.killed import steps_before_death
from tests.surgery.tiny import build, llama, logits, tokens

from llama_surgery import SurgeryError
from llama_surgery.learning import gumbel_attach
from llama_surgery.learning.gumbel import (
    Gumbel,
    GumbelSettings,
    balls_of,
    expected_distance,
    gumbel_digits,
    gumbel_for,
    load_balance,
)
from llama_surgery.learning.gumbel_attach import gumbel_in
from llama_surgery.learning.gumbel_trainer import GumbelStep, learn_gumbel
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.topology.balls import ball_ids, ball_mask
from llama_surgery.topology.router import levels_for

SETTINGS = GumbelSettings(length=128, steps=6, window=8, rate=0.05)


def random_routers(model, arities: tuple[int, ...], seed: int = 0) -> Gumbel:
    gumbel = gumbel_for(model, dataclasses.replace(SETTINGS, arities=arities, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in gumbel.routers.values():
            for projection in router.projections:
                projection.bias.zero_()
                projection.weight.copy_(torch.randn(projection.weight.shape, generator=generator))
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
def test_the_expected_distance_of_digits_is_their_distance(arity: int) -> None:
    levels, n = 4, 24
    digits = torch.randint(arity, (n, levels), generator=torch.Generator().manual_seed(arity))
    one_hot = torch.nn.functional.one_hot(digits, arity).double()
    distance = expected_distance(one_hot, one_hot)
    for radius in range(levels + 1):
        balls = ball_ids(digits, arity, radius)
        assert torch.equal(distance <= radius, balls[:, None] == balls)
    # An ultrametric: d(i, k) ≤ max(d(i, j), d(j, k)).
    assert (distance[:, None] <= torch.maximum(distance[:, :, None], distance[None])).all()
    assert distance.max() > 0


def trained_masks(model, gumbel: Gumbel, ids: torch.Tensor, monkeypatch) -> list[torch.Tensor]:
    """Hard masks (batch, heads of a group, rows, keys) that training uses, by layer, then by group."""
    masks, real = [], gumbel_attach.soft_attention

    def spy(queries, keys, values, digits, gumbel: Gumbel, scale: float) -> torch.Tensor:
        rows = torch.arange(queries.shape[2], device=queries.device)
        for part in digits:
            radius = gumbel.settings.radius_of(part.shape[-2])
            near = expected_distance(part, part) <= radius + 0.5
            recent = (rows == 0) | (rows[:, None] - rows < gumbel.settings.window)
            masks.append((near | recent) & (rows <= rows[:, None]))
        return real(queries, keys, values, digits, gumbel, scale)

    monkeypatch.setattr(gumbel_attach, "soft_attention", spy)
    gumbel.training, gumbel.generator = True, None
    with torch.no_grad(), gumbel_in(model, gumbel):
        model(ids, use_cache=False)
    gumbel.training = False
    return masks


#: Where the kernels run: a GPU, or a CPU under Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize(
    ("arities", "radius", "window", "length", "heads", "kv_heads"),
    [
        ((2,), None, 8, 96, 4, 2),
        ((2,), 0, 1, 65, 4, 1),
        ((3,), 2, 8, 63, 4, 4),
        ((5,), 1, 20, 33, 4, 2),
        ((2, 4), None, 8, 101, 4, 2),
        ((2, 3), 3, 16, 77, 6, 3),  # a group of heads ends inside a KV head's
        ((2, 7), 4, 8, 50, 4, 2),  # wider than one of the trees is deep: that one is dense
    ],
)
def test_kernels_execute_the_trained_mask(
    arities, radius, window, length, heads, kv_heads, monkeypatch
) -> None:
    """The same mask, and the same logits to rounding: whole windows, pieces, and single tokens."""
    model = build(
        "Llama",
        dtype=torch.float32,
        hidden_size=96,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    ).to(DEVICE)
    ids, gumbel, heard = tokens(2, length).to(DEVICE), random_routers(model, arities), []
    gumbel.settings = dataclasses.replace(gumbel.settings, radius=radius, window=window)
    masks = trained_masks(model, gumbel, ids, monkeypatch)

    def run(backend: str, *cuts: int) -> torch.Tensor:
        gumbel.backend, cache, outs = backend, None, []
        gumbel.reset()
        with torch.no_grad(), gumbel_in(model, gumbel):
            for piece in ids.tensor_split(cuts, 1):
                answer = model(piece, use_cache=True, **{CACHE_NAME: cache})
                cache = answer[CACHE_NAME]
                outs.append(answer.logits)
        return torch.cat(outs, 1)

    expected, density = run("reference"), gumbel.density()
    gumbel.listener = lambda layer, balls: heard.append(balls)
    whole = run("triton")
    groups = [part for balls in heard for part in balls.chunk(len(arities), 1)]
    assert len(groups) == len(masks)
    for balls, mask in zip(groups, masks, strict=True):
        assert torch.equal(ball_mask(balls, torch.arange(length, device=DEVICE), window), mask)
    assert gumbel.density() == density < 1
    assert gumbel.executed_density() > density
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(run("triton", 17, length - 2, length - 1), expected, rtol=0, atol=2e-5)
    assert gumbel.density() == pytest.approx(density)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_generation_sees_what_whole_windows_see(backend) -> None:
    model, ids = llama(), tokens(60)
    if backend == "triton":
        model, ids = build("Llama", dtype=torch.float32).to(DEVICE), ids.to(DEVICE)
    gumbel = random_routers(model, (2,))
    gumbel.backend = backend
    with torch.no_grad(), gumbel_in(model, gumbel):
        out = model.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=6, do_sample=False
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


def test_a_cache_that_routers_have_not_seen_is_refused() -> None:
    model, ids = llama(), tokens(1, 30)
    gumbel = random_routers(model, (2,))
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True)[CACHE_NAME]
        with gumbel_in(model, gumbel), pytest.raises(SurgeryError, match="cache holds 20 tokens"):
            model(ids[:, 20:], **{CACHE_NAME: cache})


def test_padded_prompts_are_refused() -> None:
    model, mask = llama(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    with gumbel_in(model, random_routers(model, (2,))), pytest.raises(SurgeryError, match="unpadded"):
        model(tokens(2, 12), attention_mask=mask)


SCRIPT = """
import dataclasses, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.learning.test_gumbel import SETTINGS
from tests.surgery.tiny import build, tokens
from llama_surgery.learning.gumbel_trainer import learn_gumbel
settings = dataclasses.replace(SETTINGS, steps=14)
learn_gumbel(
    build("Llama", dtype=torch.float32),
    tokens(4, 128),
    settings,
    lambda step: print(step.step, flush=True),
    checkpoint_file=Path(sys.argv[1]),
    every_seconds=0,
)
"""


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoint.pt"
    seen = steps_before_death(SCRIPT, file, 4)
    assert 4 <= len(seen) < 14 and file.exists()

    rest: list[GumbelStep] = []
    settings, ids = dataclasses.replace(SETTINGS, steps=14), tokens(4, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build("Llama", dtype=torch.float32)
        resumed = learn_gumbel(model, ids, settings, rest.append, checkpoint_file=file)
        whole = learn_gumbel(model, ids, settings)
    finally:
        torch.set_num_threads(threads)
    assert 3 < rest[0].step <= 6 and rest[-1].step == 14
    for one, other in zip(resumed.routers.parameters(), whole.routers.parameters(), strict=True):
        assert torch.equal(one, other)
    finished: list[GumbelStep] = []
    again = learn_gumbel(model, ids, settings, finished.append, checkpoint_file=file)
    assert not finished and torch.equal(next(again.routers.parameters()), next(whole.routers.parameters()))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, ids, file = build("Llama", dtype=torch.float32), tokens(2, 64), tmp_path / "checkpoint.pt"
    short = dataclasses.replace(SETTINGS, steps=1)
    learn_gumbel(model, ids, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match="settings differ"):
        learn_gumbel(model, ids, dataclasses.replace(short, seed=5), checkpoint_file=file)
    with pytest.raises(SurgeryError, match="windows differ"):
        learn_gumbel(model, ids + 1, short, checkpoint_file=file)


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
    with pytest.raises(SurgeryError, match="radius=-1"):
        dataclasses.replace(SETTINGS, radius=-1)
    with pytest.raises(SurgeryError, match="at most length=128"):
        learn_gumbel(llama(), tokens(1, 130), SETTINGS)
    logits_of_digits = [torch.zeros(1, 2, 5, 3, 2), torch.zeros(1, 2, 5, 2, 4)]
    assert balls_of(logits_of_digits, SETTINGS).shape == (1, 4, 5)
