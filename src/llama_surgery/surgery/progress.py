"""What is said of work that takes minutes: calls of a function, or a bar on a terminal."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from transformers.utils.logging import tqdm

#: Called as ``progress(stage, done, total)`` after each step of a stage.
Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def counted(
    model: torch.nn.Module, stage: str, total: int, progress: Progress | None = None
) -> Iterator[None]:
    """Tell of the model's passes within a ``with`` block.

    Args:
        model: What is run.
        stage: What it is run for.
        total: Passes expected; there may be fewer.
        progress: Told before the first pass, after each and at the end. If None there is a bar as
            transformers has them, where standard error is a terminal (or the code runs in a notebook).
    """
    passes = itertools.count(1)
    with told_or_shown(stage, total, progress) as tell:
        hook = model.register_forward_hook(lambda *_: tell(stage, min(next(passes), total), total))
        try:
            tell(stage, 0, total)
            yield
            tell(stage, total, total)
        finally:
            hook.remove()


@contextlib.contextmanager
def told_or_shown(stage: str, total: int, progress: Progress | None) -> Iterator[Progress]:
    """Whom to tell of a stage's steps: ``progress``, or where that is None a bar as of :func:`counted`."""
    if progress is not None:
        yield progress
        return
    with tqdm(desc=stage, total=total, disable=None) as bar:
        yield _Bar(bar)


class _Bar:
    """A bar as a :data:`Progress`; where transformers' bars are turned off it knows no count of its own."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._done = bar, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._bar.update(done - self._done)
        self._done = done
