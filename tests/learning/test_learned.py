"""learn(): from text to an operated model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.surgery.test_calibrate import LENGTH, TEXT, Letters
from tests.surgery.tiny import SPARSE, build, llama

from llama_surgery import SurgeryConfig, SurgeryError, config_of, eject, is_operated, learn, statistics
from llama_surgery.learning.learned import usual_parts
from llama_surgery.learning.trainer import Step
from llama_surgery.surgery.operation import routers_of

GIVEN = {"density": 0.2, "text": TEXT, "tokenizer": Letters(), "length": LENGTH}


def test_learn_operates_with_what_it_learned() -> None:
    model, stages, steps = build("Llama"), [], list[Step]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = learn(
        model,
        SPARSE,
        steps=3,
        windows=2,
        **GIVEN,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
        report=steps.append,
    )
    assert same is model and is_operated(model)
    assert [step.step for step in steps] == [1, 2, 3]
    assert {"first threshold", "learning"} <= {stage for stage, _, _ in stages}
    routers = routers_of(model)
    assert all(router.summary is not None for router in routers.values())
    assert any(router.mean_weight.log().abs().max() > 0 for router in routers.values())
    ids = torch.tensor([Letters()(TEXT[0]).input_ids[:LENGTH]])
    with torch.no_grad():
        model(ids)
    assert 0 < statistics(model).far_density < 0.3
    assert config_of(model).dense_until == SPARSE.dense_until
    eject(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_saves_calibrating_the_first_threshold(tmp_path: Path) -> None:
    given, stages = {**GIVEN, "steps": 2, "windows": 2, "checkpoint_file": tmp_path / "run.pt"}, list[str]()
    first = learn(build("Llama"), SPARSE, **given)
    again = learn(build("Llama"), SPARSE, **given, progress=lambda stage, *_: stages.append(stage))
    assert stages and not {"first threshold", "learning"} & set(stages)
    assert config_of(first) == config_of(again)


def test_a_model_that_is_operated_or_trained_is_refused() -> None:
    model = llama()
    with pytest.raises(SurgeryError, match="training mode"):
        learn(model.train(), SPARSE, steps=1, **GIVEN)
    with pytest.raises(SurgeryError, match="learn_gumbel"):
        learn(model.eval(), SurgeryConfig(topology="gumbel"), steps=1, **GIVEN)
    assert not is_operated(model)


def test_usual_parts() -> None:
    assert usual_parts(SPARSE) == ("channels", "summary")
    assert usual_parts(dataclasses.replace(SPARSE, summary="none")) == ("channels",)
