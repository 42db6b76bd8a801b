"""SurgeryConfig checks itself; every message says what was got and what is allowed."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.config import CONFIG_VERSION, REMOVED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "ring"}, "topology='ring': allowed are pages, gumbel"),
        ({"backend": "cuda"}, "backend='cuda': allowed are auto, reference, gather"),
        ({"backend": ["auto"]}, r"backend=\['auto'\]: allowed are auto"),
        ({"chunk_size": 0}, "chunk_size=0: must be a whole number of at least 1"),
        ({"chunk_size": 512.0}, "chunk_size=512.0: must be a whole number"),
        ({"page_size": -64}, "page_size=-64: must be a whole number of at least 1"),
        ({"page_size": "64"}, "page_size='64': must be a whole number"),
        ({"window": -1}, "window=-1: must be a whole number of at least 0"),
        ({"tile": 0}, "tile=0: must be a whole number of at least 1"),
        ({"tile": True}, "tile=True: must be a whole number"),
        ({"tile": None}, "tile=None: must be a whole number"),
        ({"dense_until": -32}, "dense_until=-32: must be a whole number of at least 0"),
        ({"dense_until": 2**31}, "dense_until=2147483648: at most 2147483647, since positions"),
        ({"theta": -0.1}, "theta=-0.1: must be a finite number of at least 0"),
        ({"theta": float("nan")}, "theta=nan: must be a finite number"),
        ({"theta": float("inf")}, "theta=inf: must be a finite number"),
        ({"theta": "0.1"}, "theta='0.1': must be a finite number"),
        ({"theta": None}, "theta=None: must be a finite number"),
        ({"theta_length": -1}, "theta_length=-1: must be a whole number of at least 0"),
        ({"theta_length": 2**31}, "theta_length=2147483648: at most 2147483647"),
        ({"theta_decode": -1}, "theta_decode=-1: must be a finite number of at least 0"),
        ({"theta_decode": "x"}, "theta_decode='x': must be a finite number"),
        (
            {"chunk_size": 520, "page_size": 65},
            "chunk_size=520 is not a multiple of tile=64.*multiples of 64",
        ),
        ({"window": 100}, "window=100 is not a multiple of tile=64: a tile would straddle"),
        ({"dense_until": 100}, "dense_until=100 is not a multiple of tile=64"),
        ({"chunk_size": 2**16}, "chunk_size=65536: at most 32768, since offsets"),
        ({"page_size": 96}, "chunk_size=512 is not page_size=96 times a power of two"),
        ({"page_size": 1024}, "chunk_size=512 is not page_size=1024 times a power"),
        ({"chunk_size": np.float32(512)}, "chunk_size=512.0: must be a whole number"),
        ({"chunk_size": torch.tensor([512, 512])}, r"chunk_size=tensor.*: must be a whole number"),
        ({"theta": True}, "theta=True: must be a finite number"),
        ({"theta": np.bool_(True)}, "theta=True: must be a finite number"),
        ({"theta": torch.tensor(float("nan"))}, "theta=nan: must be a finite number"),
        ({"theta": 10**400}, "theta=1000.*: must be a finite number"),
        ({"theta_decode": False}, "theta_decode=False: must be a finite number"),
        ({"page_size": 0}, "page_size=0: must be a whole number of at least 1"),
        (
            {"tile": 1, "theta": 0.1, "theta_decode": 0.2},
            "theta=0.1 and theta_decode=0.2 differ with tile=1.*Give one value",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(SurgeryError, match=message):
        SurgeryConfig(**changes)


def test_values_are_given_by_name_and_never_changed():
    with pytest.raises(TypeError):
        SurgeryConfig("pages")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SurgeryConfig().theta = 0.5


def test_replacing_checks_again():
    with pytest.raises(SurgeryError, match="window=7"):
        dataclasses.replace(SurgeryConfig(), window=7)


@pytest.mark.parametrize(
    ("chunk_size", "page_size", "depth", "pages"),
    [(512, 64, 3, 8), (64, 64, 0, 1), (192, 48, 2, 4), (2048, 32, 6, 64), (64, 1, 6, 64)],
)
def test_the_tree_follows_from_the_sizes(chunk_size, page_size, depth, pages):
    config = SurgeryConfig(chunk_size=chunk_size, page_size=page_size)
    assert (config.depth, config.pages_per_chunk) == (depth, pages)


def test_theta_belongs_to_the_tile():
    config = SurgeryConfig(theta=0.04, theta_decode=0.01)
    assert config.theta_for(64) == 0.04 and config.theta_for(1) == 0.01
    single = SurgeryConfig(tile=1, theta=0.02)
    assert single.theta_decode == single.theta_for(1) == 0.02
    default = SurgeryConfig()
    assert default.theta_decode == 0  # decode steps read everything unless told otherwise
    assert SurgeryConfig(theta=0.0).theta_decode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 64},
        {"page_size": 16, "chunk_size": 256},
        {"theta": 0.2},
        {"tile": 1},
        {"tile": 1, "theta": 0.2},
        {"window": 64},
    ],
)
@pytest.mark.parametrize("start", [{}, {"tile": 1}, {"page_size": 128}, {"theta": 0.0}])
def test_a_replaced_configuration_is_the_one_constructed(start, change):
    expected = SurgeryConfig(**{**start, **change})
    for config in (
        SurgeryConfig(**start),
        SurgeryConfig.from_dict(json.loads(json.dumps(SurgeryConfig(**start).to_dict()))),
        pickle.loads(pickle.dumps(SurgeryConfig(**start))),
        copy.deepcopy(SurgeryConfig(**start)),
        dataclasses.replace(SurgeryConfig(**start), theta_decode=None),
    ):
        replaced = dataclasses.replace(dataclasses.replace(config, window=128), **change)
        replaced = dataclasses.replace(replaced, window=expected.window)
        assert replaced == expected and hash(replaced) == hash(expected)
        assert replaced.to_dict() == expected.to_dict()
        assert replaced.theta_for(1) == expected.theta_for(1)


def test_pickles_of_older_states():
    """They are read as their JSON would be: without summaries where there were none, or refused."""
    old = {name: value for name, value in SurgeryConfig(theta=0.05).__dict__.items() if name != "summary"}
    restored = object.__new__(SurgeryConfig)
    restored.__setstate__({**old, "alpha": 1.0})
    assert restored == SurgeryConfig(theta=0.05, summary="none")
    with pytest.raises(SurgeryError, match=r"alpha=0\.5 is no longer supported"):
        object.__new__(SurgeryConfig).__setstate__({**old, "alpha": 0.5})


def test_what_was_given_stays_when_something_else_is_replaced():
    config = SurgeryConfig(theta=0.1, theta_decode=0.0)
    replaced = dataclasses.replace(config, page_size=64, theta=0.2)
    assert replaced.theta_decode == 0
    # Handed on by hand what was read, it is given from now on.
    kept = dataclasses.replace(SurgeryConfig(), theta=0.2, theta_decode=SurgeryConfig().theta_decode)
    assert dataclasses.replace(kept, theta=0.3).theta_decode == SurgeryConfig().theta_decode
    assert dataclasses.replace(kept, theta_decode=None).theta_decode == 0


def test_configurations_that_mean_the_same_are_equal():
    derived, told = SurgeryConfig(), SurgeryConfig(theta_decode=0.0)
    assert derived == told and hash(derived) == hash(told) and repr(derived) == repr(told)
    assert derived != SurgeryConfig(page_size=64)


@pytest.mark.parametrize("kind", [np.int64, np.int16, torch.tensor], ids=["int64", "int16", "tensor"])
def test_numbers_of_other_libraries_become_plain_ones(kind):
    config = SurgeryConfig(page_size=kind(64), theta=np.float64(0.25), theta_decode=kind(1))
    plain = SurgeryConfig(page_size=64, theta=0.25, theta_decode=1.0)
    assert config == plain and json.dumps(config.to_dict()) == json.dumps(plain.to_dict())


def test_the_size_of_balls_of_older_releases_is_passed_over():
    assert SurgeryConfig.from_dict({"version": 1, "page_size": 64, "moment_size": 16}).page_size == 64


def test_adapters_of_older_releases_mean_what_they_say():
    # Older releases wrote out what they derived, with a share of their own.
    told = {"version": 1, "page_size": 64, "theta": 0.1, "theta_decode": 0.05}
    config = SurgeryConfig.from_dict(told)
    assert {name: config.to_dict()[name] for name in told} == told
    assert dataclasses.replace(config, theta=0.2, page_size=32).to_dict()["theta_decode"] == 0.05


def test_what_is_gone_is_ignored_where_it_changed_nothing():
    told = SurgeryConfig(page_size=64).to_dict()
    told |= REMOVED
    assert SurgeryConfig.from_dict(told) == SurgeryConfig(page_size=64)
    assert not set(REMOVED) & SurgeryConfig().to_dict().keys()


@pytest.mark.parametrize("name", REMOVED)
def test_what_is_gone_is_refused_where_it_meant_something(name):
    values = SurgeryConfig().to_dict() | {name: "another"}
    with pytest.raises(SurgeryError, match=f"{name}='another' is no longer supported"):
        SurgeryConfig.from_dict(values)


@st.composite
def configs(draw):
    tile = draw(st.sampled_from([1, 8, 32]))
    theta = draw(st.floats(0, 2))
    return SurgeryConfig(
        chunk_size=draw(st.sampled_from([64, 256])),
        page_size=draw(st.sampled_from([16, 64])),
        window=32 * draw(st.integers(0, 4)),
        tile=tile,
        theta=theta,
        theta_decode=theta if tile == 1 else draw(st.none() | st.floats(0, 2)),
        theta_length=draw(st.sampled_from([0, 1, 8192])),
        dense_until=32 * draw(st.integers(0, 4)),
    )


@given(configs())
def test_json_and_back(config):
    told = json.loads(json.dumps(config.to_dict()))
    assert told["version"] == CONFIG_VERSION
    assert SurgeryConfig.from_dict(told) == config


def test_a_theta_that_never_falls_is_stored_as_earlier_releases_read_it():
    assert "theta_length" not in SurgeryConfig().to_dict()
    assert SurgeryConfig(theta_length=8192).to_dict()["theta_length"] == 8192


def test_fields_left_out_take_their_defaults():
    assert SurgeryConfig.from_dict({}) == SurgeryConfig()
    assert SurgeryConfig.from_dict({"window": 256}).window == 256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": CONFIG_VERSION + 1}, f"reads up to {CONFIG_VERSION}. Update llama-surgery"),
        ({"version": "newest"}, "configuration version 'newest'"),
        ({"thetta": 0.1, "colour": 3}, "unknown configuration fields: colour, thetta"),
        ({"theta": []}, r"theta=\[\]: must be a finite number"),
    ],
)
def test_dictionaries_that_cannot_be_read_are_refused(values, message):
    with pytest.raises(SurgeryError, match=message):
        SurgeryConfig.from_dict(values)
