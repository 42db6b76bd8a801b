"""The trainer: it lowers the loss at the asked density, resumes exactly, and leaves the model as it was."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tests.learning.killed import steps_before_death
from tests.surgery.tiny import SPARSE, build, llama, logits, tokens

from llama_surgery import SurgeryError, is_operated, operated, statistics
from llama_surgery.learning.corrections import Corrections, scorer_parameters
from llama_surgery.learning.settings import LearningSettings, homotopy_at, rate_at
from llama_surgery.learning.trainer import Step, learn
from llama_surgery.surgery.operation import routers_of

SETTINGS = LearningSettings(density=0.15, length=192, steps=30, rate=0.1, parts=("channels",))
#: Run in a process of its own, so that it can be killed.
SCRIPT = """
import sys, torch
from pathlib import Path
from llama_surgery.learning.trainer import learn
from tests.learning.test_trainer import SETTINGS, SPARSE, windows, build
torch.set_num_threads(1)
learn(build("Llama", dtype=torch.float32), SPARSE, windows(), SETTINGS, checkpoint_file=Path(sys.argv[1]),
      every_seconds=0, progress=lambda step: print(step.step, flush=True))
"""


def windows(count: int = 6, length: int = SETTINGS.length) -> torch.Tensor:
    return tokens(count, length, seed=3)


def vector(corrections: Corrections) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in corrections.parameters()])


def test_it_learns_at_the_density_and_leaves_the_model_alone() -> None:
    model = build("Llama", dtype=torch.float32)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    ids, steps = windows(), []
    before = logits(model, ids[0])
    settings = dataclasses.replace(SETTINGS, steps=60)
    learned = learn(model, SPARSE, ids, settings, progress=steps.append)
    assert not is_operated(model) and torch.equal(before, logits(model, ids[0]))
    assert all(torch.equal(weights[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert all(isinstance(step, Step) and step.loss >= -1e-6 and 0 <= step.mass_lost < 1 for step in steps)
    tail = [step.density for step in steps[-12:]]
    assert sum(tail) / len(tail) == pytest.approx(settings.density, rel=0.15)

    theta = steps[-1].theta
    config = dataclasses.replace(SPARSE, theta=theta, theta_decode=theta)
    with operated(model, config, routers=scorer_parameters(learned)):
        for window in ids:
            logits(model, window, use_cache=False)
        assert statistics(model).far_density == pytest.approx(settings.density, rel=0.15)


def test_learned_corrections_keep_the_metric_that_operate_sorts_keys_in() -> None:
    model = build("Llama", dtype=torch.float32)
    with operated(model, SPARSE):
        metric = {index: router.key_weight for index, router in routers_of(model).items()}
    learned = learn(model, SPARSE, windows(), dataclasses.replace(SETTINGS, steps=1))
    routers = scorer_parameters(learned)
    assert routers.keys() == metric.keys()
    for index, weight in metric.items():
        torch.testing.assert_close(routers[index].key_weight, weight, rtol=1e-4, atol=1e-5)


def test_budgets_leave_heads_that_do_nothing() -> None:
    model = build("Llama", dtype=torch.float32)
    with torch.no_grad():  # the first query head of every group counts for nothing
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 0:16] = 0
            layer.self_attn.o_proj.weight[:, 32:48] = 0
    ids, steps = windows(), []
    settings = dataclasses.replace(SETTINGS, parts=(), steps=50)
    learned = learn(model, SPARSE, ids, settings, progress=steps.append)
    used = torch.stack([layer.offset.detach() for layer in learned.values()])  # (layers, kv_heads, group)
    assert (used[..., 0] > used[..., 1]).all()


def test_the_same_seed_gives_the_same_result_and_another_does_not() -> None:
    model, ids = build("Llama", dtype=torch.float32), windows()
    short = dataclasses.replace(SETTINGS, steps=4, parts=("tree",))
    first, again = (vector(learn(model, SPARSE, ids, short)) for _ in range(2))
    other = vector(learn(model, SPARSE, ids, dataclasses.replace(short, seed=1)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoint.pt"
    seen = steps_before_death(SCRIPT, file, 5)
    assert 5 <= len(seen) < SETTINGS.steps and file.exists()

    rest: list[Step] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build("Llama", dtype=torch.float32)
        resumed = learn(model, SPARSE, windows(), SETTINGS, checkpoint_file=file, progress=rest.append)
        whole = learn(model, SPARSE, windows(), SETTINGS)
    finally:
        torch.set_num_threads(threads)
    assert 4 < rest[0].step <= 7 and rest[-1].step == SETTINGS.steps
    assert torch.equal(vector(resumed), vector(whole))


def test_a_run_goes_on_whatever_threshold_was_found_anew(tmp_path: Path) -> None:
    model, ids, file = build("Llama", dtype=torch.float32), windows(), tmp_path / "checkpoint.pt"
    short, steps = dataclasses.replace(SETTINGS, steps=2), list[Step]()
    first = vector(learn(model, SPARSE, ids, short, checkpoint_file=file))
    other = dataclasses.replace(SPARSE, theta=SPARSE.theta * (1 + 1e-7))
    again = learn(model, other, ids, short, checkpoint_file=file, progress=steps.append)
    assert not steps and torch.equal(first, vector(again))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, ids, file = build("Llama", dtype=torch.float32), windows(), tmp_path / "checkpoint.pt"
    short = dataclasses.replace(SETTINGS, steps=1)
    learn(model, SPARSE, ids, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match=r"\(settings.seed differ"):
        learn(model, SPARSE, ids, dataclasses.replace(short, seed=5), checkpoint_file=file)
    with pytest.raises(SurgeryError, match="windows differ"):
        learn(model, SPARSE, ids + 1, short, checkpoint_file=file)
    with pytest.raises(SurgeryError, match=r"\(model differ"), torch.no_grad():
        next(model.parameters()).add_(1)
        learn(model, SPARSE, ids, short, checkpoint_file=file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(SurgeryError, match="damaged"):
        learn(model, SPARSE, ids, short, checkpoint_file=file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_without_nan(dtype) -> None:
    model, steps = build("Llama", dtype=dtype), []
    settings = dataclasses.replace(SETTINGS, steps=6, parts=("channels", "tree"))
    learned = learn(model, SPARSE, windows(), settings, progress=steps.append)
    assert torch.isfinite(vector(learned)).all() and vector(learned).abs().max() > 0
    assert all(step.loss == step.loss for step in steps)


def test_the_course_of_the_homotopy() -> None:
    settings = dataclasses.replace(SETTINGS, steps=100)
    course = [homotopy_at(step, settings) for step in range(100)]
    assert course[0].strength == 0 and course[10].strength == 1 and course[99].strength == 1
    assert course[10].temperature == 0.5 and course[80].temperature == pytest.approx(0.1)
    assert all(a.temperature >= b.temperature for a, b in itertools.pairwise(course))
    rates = [rate_at(step, settings) for step in range(100)]
    assert max(rates) <= settings.rate and rates[0] < rates[9] > rates[99]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"density": 0.0}, "density"),
        ({"steps": 0}, "steps"),
        ({"parts": ("nonsense",)}, "parts"),
        ({"sampled_tiles": 0}, "sampled_tiles"),
        ({"rate": 2.0}, "rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, told) -> None:
    with pytest.raises(SurgeryError, match=told):
        dataclasses.replace(SETTINGS, **changes)


def test_what_cannot_be_learned_is_refused() -> None:
    model, ids = llama(), windows()
    with pytest.raises(SurgeryError, match="threshold"):
        learn(model, dataclasses.replace(SPARSE, theta=0.0), ids, SETTINGS)
    with pytest.raises(SurgeryError, match="multiple"):
        learn(model, SPARSE, ids[:, :190], dataclasses.replace(SETTINGS, length=190))
    with pytest.raises(SurgeryError, match="more than dense_until"):
        learn(model, dataclasses.replace(SPARSE, dense_until=SETTINGS.length), ids, SETTINGS)
    with operated(model, SPARSE), pytest.raises(SurgeryError, match="operated"):
        learn(model, SPARSE, ids, SETTINGS)
