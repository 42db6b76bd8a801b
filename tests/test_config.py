"""SurgeryConfig checks itself; every message says what was got and what is allowed."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.config import CONFIG_VERSION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "ring"}, "topology='ring': allowed are pages, dense"),
        ({"directions": "random"}, "directions='random': allowed are principal, subspace, position"),
        ({"backend": "cuda"}, "backend='cuda': allowed are auto, reference, gather"),
        ({"chunk_size": 0}, "chunk_size=0: must be a whole number of at least 1"),
        ({"chunk_size": 512.0}, "chunk_size=512.0: must be a whole number"),
        ({"page_size": -64}, "page_size=-64: must be a whole number of at least 1"),
        ({"page_size": "64"}, "page_size='64': must be a whole number"),
        ({"window": -1}, "window=-1: must be a whole number of at least 0"),
        ({"tile": 0}, "tile=0: must be a whole number of at least 1"),
        ({"tile": True}, "tile=True: must be a whole number"),
        ({"tile": None}, "tile=None: must be a whole number"),
        ({"arity": 1}, "arity=1: must be a whole number of at least 2"),
        ({"score_stride": 0}, "score_stride=0: must be a whole number of at least 1"),
        ({"dense_until": -32}, "dense_until=-32: must be a whole number of at least 0"),
        ({"pages_per_row": 0}, "pages_per_row=0: must be a whole number of at least 1"),
        ({"theta": -0.1}, "theta=-0.1: must be a finite number of at least 0"),
        ({"theta": float("nan")}, "theta=nan: must be a finite number"),
        ({"theta": float("inf")}, "theta=inf: must be a finite number"),
        ({"theta": "0.1"}, "theta='0.1': must be a finite number"),
        ({"theta": None}, "theta=None: must be a finite number"),
        ({"theta_decode": -1}, "theta_decode=-1: must be a finite number of at least 0"),
        ({"theta_decode": "x"}, "theta_decode='x': must be a finite number"),
        ({"alpha": float("inf")}, "alpha=inf: must be a finite number"),
        (
            {"chunk_size": 520, "page_size": 65},
            "chunk_size=520 is not a multiple of tile=32.*multiples of 32",
        ),
        ({"window": 100}, "window=100 is not a multiple of tile=32: a tile would straddle"),
        ({"dense_until": 100}, "dense_until=100 is not a multiple of tile=32"),
        ({"score_stride": 3}, "score_stride=3 does not divide tile=32: the first row"),
        ({"score_stride": 64}, "score_stride=64 does not divide tile=32"),
        ({"chunk_size": 2**16}, "chunk_size=65536: at most 32768, since offsets"),
        ({"page_size": 96}, "chunk_size=512 is not page_size=96 times a power of arity=2"),
        ({"page_size": 1024}, "chunk_size=512 is not page_size=1024 times a power"),
        ({"page_size": 64, "arity": 3}, "chunk_size=512 is not page_size=64 times a power of arity=3"),
        ({"moment_size": 0}, "moment_size=0: must be a whole number of at least 1"),
        ({"moment_size": "8"}, "moment_size='8': must be a whole number"),
        (
            {"page_size": 64, "moment_size": 24},
            "moment_size=24: page_size=64 must be it times a power of arity=2",
        ),
        ({"page_size": 64, "moment_size": 128}, "moment_size=128: page_size=64 must be it times a power"),
        ({"variance_pool": 0}, "variance_pool=0: must be a whole number of at least 1"),
        ({"variance_pool": 3}, "variance_pool=3: 1 or an even number"),
        (
            {"tile": 1, "theta": 0.1, "theta_decode": 0.2},
            "theta=0.1 and theta_decode=0.2 differ with tile=1.*Give one value",
        ),
        (
            {"pages_per_row": 4, "coarse_to_fine": True},
            "coarse_to_fine needs a threshold: leave pages_per_row",
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
    ("chunk_size", "page_size", "arity", "depth", "pages"),
    [(512, 64, 2, 3, 8), (64, 64, 2, 0, 1), (96, 32, 3, 1, 3), (2048, 32, 4, 3, 64), (64, 1, 2, 6, 64)],
)
def test_the_tree_follows_from_the_sizes(chunk_size, page_size, arity, depth, pages):
    config = SurgeryConfig(chunk_size=chunk_size, page_size=page_size, arity=arity)
    assert (config.depth, config.pages_per_chunk) == (depth, pages)


def test_moments_are_kept_two_levels_below_a_page_unless_given():
    assert SurgeryConfig(page_size=64).moment_size == 16
    assert SurgeryConfig(page_size=64, moment_size=64).balls_per_page == 1
    assert SurgeryConfig(chunk_size=64, page_size=2, tile=1).moment_size == 2  # no two levels below
    assert SurgeryConfig(page_size=64).balls_per_page == 4


def test_theta_belongs_to_the_tile():
    config = SurgeryConfig(theta=0.04, theta_decode=0.01)
    assert config.theta_for(32) == 0.04 and config.theta_for(1) == 0.01
    single = SurgeryConfig(tile=1, theta=0.02)
    assert single.theta_decode == single.theta_for(1) == 0.02
    default = SurgeryConfig()
    assert 0 < default.theta_decode < default.theta
    assert SurgeryConfig(theta=0.0).theta_decode == 0


@st.composite
def configs(draw):
    tile = draw(st.sampled_from([1, 8, 32]))
    theta = draw(st.floats(0, 2))
    return SurgeryConfig(
        topology=draw(st.sampled_from(["pages", "dense"])),
        chunk_size=draw(st.sampled_from([64, 256])),
        page_size=draw(st.sampled_from([16, 64])),
        moment_size=draw(st.sampled_from([None, 4, 16])),
        window=32 * draw(st.integers(0, 4)),
        tile=tile,
        directions=draw(st.sampled_from(["principal", "position"])),
        theta=theta,
        theta_decode=theta if tile == 1 else draw(st.none() | st.floats(0, 2)),
        pages_per_row=draw(st.none() | st.integers(1, 9)),
        alpha=draw(st.floats(0, 3)),
        dense_until=32 * draw(st.integers(0, 4)),
    )


@given(configs())
def test_json_and_back(config):
    told = json.loads(json.dumps(config.to_dict()))
    assert told["version"] == CONFIG_VERSION
    assert SurgeryConfig.from_dict(told) == config


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
