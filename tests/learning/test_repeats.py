"""Windows in which passages come again."""

import pytest
import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.learning.repeats import LONGEST, REFRAIN, with_repeats
from llama_surgery.learning.settings import LearningSettings

LENGTH, FIRST = 4096, 704


def copied(window: torch.Tensor) -> torch.Tensor:
    """Where a window of distinct tokens no longer holds its own."""
    return window != torch.arange(LENGTH)


def test_share_of_a_window_comes_again() -> None:
    plain = torch.arange(LENGTH).repeat(REFRAIN - 1, 1)
    again = with_repeats(plain, 0.2, FIRST, seed=3)
    for window in again:
        changed = copied(window)
        assert 0.15 < changed.float().mean() < 0.22  # copies may lie on one another
        assert not changed[:FIRST].any()
        assert (window <= torch.arange(LENGTH)).all()  # a copy is of something earlier
    assert torch.equal(plain, torch.arange(LENGTH).repeat(REFRAIN - 1, 1))
    assert not torch.equal(again[0], again[1])


def test_refrain_fills_most_of_some_windows() -> None:
    windows = with_repeats(torch.arange(LENGTH).repeat(REFRAIN, 1), 0.1, FIRST, seed=0)
    counts = windows[-1].bincount(minlength=LENGTH)
    assert counts[counts > 3].sum() > LENGTH / 2
    assert (counts > 3).sum() <= LONGEST + 16  # one passage, and few others that were copied so often
    assert windows[0].bincount(minlength=LENGTH).max() <= 4


def test_seed_decides() -> None:
    plain = torch.arange(LENGTH).repeat(8, 1)
    first, again, other = (with_repeats(plain, 0.2, FIRST, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Windows of a smaller count are the first of a larger one.
    assert torch.equal(first[:3], with_repeats(plain[:3], 0.2, FIRST, seed=1))


def test_nothing_to_repeat() -> None:
    plain = torch.arange(LENGTH)[None]
    assert with_repeats(plain, 0.0, FIRST, seed=0) is plain
    short = torch.arange(FIRST + LONGEST)[None]
    assert with_repeats(short, 0.2, FIRST, seed=0) is short


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(SurgeryError, match="at least 0 and below 1"):
        LearningSettings(density=0.06, repeats=share)
