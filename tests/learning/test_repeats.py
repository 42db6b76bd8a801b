"""Windows in which passages come again."""

import pytest
import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.learning.repeats import LONGEST, with_repeats
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.topology.geometry import first_far

LENGTH, CONFIG = 4096, SurgeryConfig()
FIRST = first_far(CONFIG)
PLAIN = torch.arange(LENGTH).repeat(3, 1)


def test_share_of_a_window_comes_again() -> None:
    again = with_repeats(PLAIN, 0.2, CONFIG, seed=3)
    for window in again:
        changed = window != torch.arange(LENGTH)
        assert 0.12 < changed[FIRST:].float().mean() < 0.25  # copies may lie on one another
        assert not changed[:FIRST].any()
        assert (window <= torch.arange(LENGTH)).all()  # a copy is of something earlier
    assert torch.equal(PLAIN, torch.arange(LENGTH).repeat(3, 1))
    assert not torch.equal(again[0], again[1])


def test_seed_decides() -> None:
    first, again, other = (with_repeats(PLAIN, 0.2, CONFIG, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Windows of a smaller count are the first of a larger one.
    assert torch.equal(first[:2], with_repeats(PLAIN[:2], 0.2, CONFIG, seed=1))


def test_nothing_to_repeat() -> None:
    assert with_repeats(PLAIN, 0.0, CONFIG, seed=0) is PLAIN
    short = torch.arange(FIRST + LONGEST)[None]
    assert with_repeats(short, 0.2, CONFIG, seed=0) is short


def test_small_chunks() -> None:
    """A far field that begins before there is a passage to copy."""
    config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=32)
    assert first_far(config) < LONGEST
    again = with_repeats(PLAIN[:, :512], 0.5, config, seed=0)
    assert not torch.equal(again, PLAIN[:, :512]) and torch.equal(again[:, :LONGEST], PLAIN[:, :LONGEST])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(SurgeryError, match="at least 0 and below 1"):
        LearningSettings(density=0.06, repeats=share)
