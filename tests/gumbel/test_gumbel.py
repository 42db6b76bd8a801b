"""The preprint's router: dense at the start, and executed with the mask it was trained with."""

import copy
import dataclasses
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.learning.killed import steps_before_death
from tests.surgery.tiny import build, llama, logits, tokens
from transformers import DynamicCache

from llama_surgery import (
    SurgeryConfig,
    SurgeryError,
    eject,
    load_adapter,
    operate,
    operated,
    paged_cache,
    reset_statistics,
    save_adapter,
    statistics,
)
from llama_surgery.gumbel import layer as gumbel_layer
from llama_surgery.gumbel.balls import ball_ids, ball_mask
from llama_surgery.gumbel.learn import GumbelLearning, GumbelStep, learn_gumbel
from llama_surgery.gumbel.router import ContentRouter, levels_for, routers_for
from llama_surgery.gumbel.soft import Drawing, balls_of, expected_distance, gumbel_digits, load_balance
from llama_surgery.gumbel_config import GumbelConfig
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import routers_of, set_config, surgery_of
from llama_surgery.surgery.supported import attention_modules, inner_model

CONFIG = SurgeryConfig(topology="gumbel", gumbel=GumbelConfig(length=128, window=8))
LEARNING = GumbelLearning(steps=6, rate=0.05)


def with_options(**options: object) -> SurgeryConfig:
    return dataclasses.replace(CONFIG, gumbel=dataclasses.replace(CONFIG.gumbel, **options))


def random_routers(model, config: SurgeryConfig, seed: int = 0) -> dict[int, ContentRouter]:
    inner = inner_model(model)
    routers = routers_for(inner, attention_modules(inner), config.gumbel, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers.values():
            for projection in router.projections:
                projection.bias.zero_()
                projection.weight.copy_(torch.randn(projection.weight.shape, generator=generator))
    return routers


def seen(model) -> float:
    """Total density by tokens: what rows see over what they might."""
    read = statistics(model)
    return read.near_density + read.visible_far_density


@pytest.mark.parametrize("arities", [(2,), (3,), (5,), (7,), (2, 4)])
def test_it_is_dense_at_step_0(arities) -> None:
    model, ids = llama(), tokens(96)
    with torch.no_grad(), operated(model, with_options(arities=arities)):
        ours = logits(model, ids, use_cache=False)
        assert seen(model) == 1.0
    torch.testing.assert_close(ours, logits(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("arities", [(2,), (3,), (5,), (2, 4)])
def test_the_executed_mask_is_the_trained_one(arities) -> None:
    model, ids, config = llama(), tokens(96), with_options(arities=arities)
    routers, outs, densities = random_routers(model, config), [], []
    for drawing in (Drawing(generator=None), None):  # no noise: the likeliest digits on both ways
        with torch.no_grad(), operated(model, config, routers=routers):
            draw(model, drawing)
            outs.append(logits(model, ids, use_cache=False))
            densities.append(seen(model))
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


def draw(model, drawing: Drawing | None) -> None:
    for layer in surgery_of(model).values():
        layer.drawing = drawing


def trained_masks(model, ids: torch.Tensor, monkeypatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hard masks (batch, heads of a group, rows, keys) of training, by layer, then by group, and logits."""
    masks, real = [], gumbel_layer.soft_attention

    def spy(queries, keys, values, digits, config: GumbelConfig, *rest: float) -> tuple[torch.Tensor, ...]:
        rows = torch.arange(queries.shape[2], device=queries.device)
        for part in digits:
            near = expected_distance(part, part) <= config.radius_of(part.shape[-2]) + 0.5
            recent = (rows == 0) | (rows[:, None] - rows < config.window)
            masks.append((near | recent) & (rows <= rows[:, None]))
        return real(queries, keys, values, digits, config, *rest)

    monkeypatch.setattr(gumbel_layer, "soft_attention", spy)
    draw(model, Drawing())
    with torch.no_grad():
        trained = model(ids, use_cache=False).logits
    draw(model, None)
    return masks, trained


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
def test_the_trained_mask_is_executed(arities, radius, window, length, heads, kv_heads, monkeypatch) -> None:
    """The same mask, and the same logits to rounding: whole windows, pieces, and single tokens."""
    model = build("Llama", hidden_size=96, num_attention_heads=heads, num_key_value_heads=kv_heads)
    ids, heard = tokens(2, length), []
    config = with_options(arities=arities, radius=radius, window=window)
    operate(model, config, routers=random_routers(model, config))
    masks, trained = trained_masks(model, ids, monkeypatch)

    def run(*cuts: int) -> torch.Tensor:
        cache, outs = None, []
        reset_statistics(model)
        with torch.no_grad():
            for piece in ids.tensor_split(cuts, 1):
                answer = model(piece, use_cache=True, **{CACHE_NAME: cache})
                cache = answer[CACHE_NAME]
                outs.append(answer.logits)
        return torch.cat(outs, 1)

    def hear(route: Callable, *given: object) -> torch.Tensor:
        heard.append(route(*given))
        return heard[-1]

    for layer in surgery_of(model).values():
        layer.route = functools.partial(hear, layer.route)
    whole, density = run(), seen(model)
    groups = [part for balls in heard for part in balls.chunk(len(arities), 1)]
    assert len(groups) == len(masks)
    for balls, mask in zip(groups, masks, strict=True):
        assert torch.equal(ball_mask(balls, torch.arange(length), window), mask)
    assert density < 1
    assert statistics(model).total_density > density
    torch.testing.assert_close(whole, trained, rtol=0, atol=2e-5)
    torch.testing.assert_close(run(17, length - 2, length - 1), whole, rtol=0, atol=2e-5)
    assert seen(model) == pytest.approx(density)
    assert set(statistics(model).by_tile) == {"1", str(config.tile)}


def test_generation_sees_what_whole_windows_see() -> None:
    model, ids = llama(), tokens(60)
    routers, config = random_routers(model, CONFIG), CONFIG
    mask = torch.ones_like(ids[None])
    with torch.no_grad(), operated(model, config, routers=routers):
        out = model.generate(ids[None], attention_mask=mask, max_new_tokens=6, do_sample=False)
        whole = logits(model, out[0], use_cache=False)
    assert torch.equal(whole[0, 59:-1].argmax(-1), out[0, 60:])


def test_caches_keep_balls_of_their_own() -> None:
    """Two texts by turns, one cut back; and sequences that are repeated and chosen, as beams are."""
    model, texts = llama(), [tokens(1, 40), tokens(1, 40, seed=1)]
    with torch.no_grad(), operated(model, CONFIG, routers=random_routers(model, CONFIG)):
        whole = [logits(model, text, use_cache=False) for text in texts]
        assert not torch.equal(*whole)
        caches = [paged_cache(model) for _ in texts]
        for part in (slice(0, 30), slice(30, 35), slice(35, 40)):
            for text, cache, expected in zip(texts, caches, whole, strict=True):
                got = model(text[:, part], use_cache=True, **{CACHE_NAME: cache}).logits
                torch.testing.assert_close(got, expected[:, part], rtol=0, atol=1e-9)
        caches[0].crop(-10)
        got = model(texts[0][:, 30:], use_cache=True, **{CACHE_NAME: caches[0]}).logits
        torch.testing.assert_close(got, whole[0][:, 30:], rtol=0, atol=1e-9)
        both, cache = torch.cat(texts), paged_cache(model)
        model(both[:, :30], use_cache=True, **{CACHE_NAME: cache})
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        got = model(both.flip(0)[:, 30:], use_cache=True, **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(got, torch.cat(whole).flip(0)[:, 30:], rtol=0, atol=1e-9)


def test_an_adapter_gives_the_same_logits(tmp_path: Path) -> None:
    model, ids, config = llama(), tokens(96), with_options(arities=(2, 4), radius=2)
    with torch.no_grad(), operated(model, config, routers=random_routers(model, config)):
        expected = logits(model, ids)
        save_adapter(model, tmp_path / "adapter")
        kept = routers_of(model)
    try:
        load_adapter(model, tmp_path / "adapter")
        assert surgery_of(model)[0].config == config
        for index, router in routers_of(model).items():
            for one, other in zip(router.parameters(), kept[index].parameters(), strict=True):
                assert torch.equal(one, other)
        with torch.no_grad():
            assert torch.equal(logits(model, ids), expected)
    finally:
        eject(model)
    other = build("Llama", hidden_size=32, head_dim=16)
    with pytest.raises(SurgeryError, match="another model"):
        load_adapter(other, tmp_path / "adapter")


def test_the_dense_model_comes_back() -> None:
    model, ids = llama(), tokens(64)
    before = logits(model, ids)
    with operated(model, CONFIG, routers=random_routers(model, CONFIG)):
        found = logits(model, ids)
        assert not torch.equal(found, before)
        copied = build("Llama", dtype=torch.float32)
        operate(copied, CONFIG, routers=random_routers(copied, CONFIG))
        again = pickle.loads(pickle.dumps(copy.deepcopy(copied)))
        assert torch.equal(logits(copied, ids), logits(again, ids))
        assert statistics(again).rows == statistics(copied).rows > 0
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.1, "text": ["a"], "tokenizer": object()}, "no threshold"),
        ({"routers": {7: None}}, r"layers \[7\], operated are \[0, 1\]"),
        ({"routers": {0: None, 1: None}}, "layer 0 does not fit"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message) -> None:
    with pytest.raises(SurgeryError, match=message):
        operate(llama(), CONFIG, **arguments)
    with operated(llama(), CONFIG):
        with pytest.raises(SurgeryError, match="eject"):
            set_config(llama(), with_options(arities=(3,)))
        with pytest.raises(SurgeryError, match="eject"):
            set_config(llama(), SurgeryConfig())
    routers = random_routers(llama(), CONFIG)
    with pytest.raises(SurgeryError, match="set topology='gumbel'"):
        operate(llama(), routers=routers)
    with pytest.raises(SurgeryError, match="does not fit the model"):
        operate(llama(), with_options(arities=(3,)), routers=routers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_runs_and_routers_leave_the_collapse(dtype) -> None:
    model, steps = build("Llama", dtype=dtype), []
    routers = learn_gumbel(model, CONFIG, tokens(4, 128), LEARNING, steps.append)
    assert [step.step for step in steps] == list(range(1, 7))
    assert all(torch.isfinite(p).all() for r in routers.values() for p in r.parameters())
    assert all(step.loss == step.loss and 0 < step.density <= 1 for step in steps)
    assert steps[0].density > 0.98 and steps[-1].balance < steps[0].balance
    assert all(p.requires_grad for p in model.parameters())


def test_a_cache_that_routers_have_not_seen_is_refused() -> None:
    model, ids = llama(), tokens(1, 30)
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True)[CACHE_NAME]
        with operated(model, CONFIG), pytest.raises(SurgeryError, match="cache holds 20 tokens"):
            model(ids[:, 20:], **{CACHE_NAME: cache})
        with operated(model, CONFIG):
            model(ids, **{CACHE_NAME: DynamicCache()})  # an empty one does for a single call


def test_padded_prompts_are_refused() -> None:
    model, mask = llama(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    with operated(model, CONFIG), pytest.raises(SurgeryError, match="unpadded"):
        model(tokens(2, 12), attention_mask=mask)


SCRIPT = """
import dataclasses, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.gumbel.test_gumbel import CONFIG, LEARNING
from tests.surgery.tiny import build, tokens
from llama_surgery.gumbel.learn import learn_gumbel
settings = dataclasses.replace(LEARNING, steps=14)
learn_gumbel(
    build("Llama", dtype=torch.float32),
    CONFIG,
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
    settings, ids = dataclasses.replace(LEARNING, steps=14), tokens(4, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build("Llama", dtype=torch.float32)
        resumed = learn_gumbel(model, CONFIG, ids, settings, rest.append, checkpoint_file=file)
        whole = learn_gumbel(model, CONFIG, ids, settings)
    finally:
        torch.set_num_threads(threads)
    assert 3 < rest[0].step <= 6 and rest[-1].step == 14
    for index, router in whole.items():
        for one, other in zip(resumed[index].parameters(), router.parameters(), strict=True):
            assert torch.equal(one, other)
    finished: list[GumbelStep] = []
    again = learn_gumbel(model, CONFIG, ids, settings, finished.append, checkpoint_file=file)
    assert not finished and torch.equal(next(again[0].parameters()), next(whole[0].parameters()))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, ids, file = build("Llama", dtype=torch.float32), tokens(2, 64), tmp_path / "checkpoint.pt"
    short = dataclasses.replace(LEARNING, steps=1)
    learn_gumbel(model, CONFIG, ids, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match=r"\(settings.seed differ"):
        learn_gumbel(model, CONFIG, ids, dataclasses.replace(short, seed=5), checkpoint_file=file)
    with pytest.raises(SurgeryError, match="windows differ"):
        learn_gumbel(model, CONFIG, ids + 1, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match=r"\(model differ"), torch.no_grad():
        next(model.parameters()).add_(1)
        learn_gumbel(model, CONFIG, ids, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match="rate=-1"):
        GumbelLearning(rate=-1)


def test_levels_and_balance() -> None:
    assert [levels_for(p, 8192) for p in (2, 3, 5)] == [13, 9, 6]
    even = torch.eye(4).repeat(8, 1)[None, None, :, None] * 50
    assert float(load_balance(even)) == pytest.approx(1.0)
    assert float(load_balance(torch.tensor([50.0, 0, 0, 0]).expand(1, 1, 9, 2, 4))) == pytest.approx(4.0)
    drawn = gumbel_digits(torch.zeros(1000, 3), 1.0, torch.Generator().manual_seed(0))
    assert (drawn.mean(0) - 1 / 3).abs().max() < 0.06


def test_arities_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SurgeryError, match="arities"):
        operate(llama(), with_options(arities=(2, 3, 5)))
    with pytest.raises(SurgeryError, match="at most length=128"):
        learn_gumbel(llama(), CONFIG, tokens(1, 130), LEARNING)
    with pytest.raises(SurgeryError, match="topology='pages'"):
        learn_gumbel(llama(), SurgeryConfig(), tokens(1, 130), LEARNING)
    logits_of_digits = [torch.zeros(1, 2, 5, 3, 2), torch.zeros(1, 2, 5, 2, 4)]
    assert balls_of(logits_of_digits, CONFIG.gumbel).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arities": ()}, "arities"),
        ({"arities": 3}, "arities=3: must be a list"),
        ({"arities": (1,)}, "of at least 2"),
        ({"radius": -1}, "radius=-1"),
        ({"window": 0}, "window=0: must be a whole number of at least 1"),
        ({"length": 1.5}, "length=1.5"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message) -> None:
    with pytest.raises(SurgeryError, match=message):
        GumbelConfig(**options)


def test_options_in_the_configuration() -> None:
    assert SurgeryConfig(topology="gumbel").gumbel == GumbelConfig()
    assert SurgeryConfig().gumbel is None and "gumbel" not in SurgeryConfig().to_dict()
    config = with_options(arities=(2, 3), radius=1)
    told = json.loads(json.dumps(config.to_dict()))
    assert SurgeryConfig.from_dict(told) == config and hash(SurgeryConfig.from_dict(told)) == hash(config)
    for arguments, message in (
        ({"gumbel": GumbelConfig()}, "not of 'pages'"),
        ({"topology": "gumbel", "backend": "gather"}, "backend='gather'"),
        ({"topology": "gumbel", "backend": "triton"}, "backend='triton'"),
        ({"topology": "gumbel", "gumbel": 3}, "must be a GumbelConfig"),
        ({"topology": "gumbel", "gumbel": {"radios": 3}}, "unknown fields of gumbel: radios"),
    ):
        with pytest.raises(SurgeryError, match=message):
            SurgeryConfig(**arguments)
