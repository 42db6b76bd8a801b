"""First tokens and decode steps of a model, operated and dense in turns."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.steps import GraphedSteps

from . import model as models
from .dense import fastest
from .dense_model import DenseModel
from .measure import graphed, once, say
from .parts import FIRST, GRAPHED, STEP
from .quantities import allocated, forget_peak, peak_bytes

#: How often the sides take turns, at least and at most, and decode steps of a turn.
LEAST, MOST, STEPS = 5, 15, 4
#: Tokens for which caches have room after the prompt: more than all decode steps.
ROOM = 256


class Turns(NamedTuple):
    """What was measured of a part.

    Attributes:
        part: One of FIRST, STEP and GRAPHED.
        ms, rival_ms: Medians over turns.
        rival: How the dense side computes attention.
        peak_bytes, rival_peak_bytes: Of allocated memory, weights included; NaN where it is not known.
        alternations: Turns of each side.
        densities: What the operated side read in its turns: ``far`` and ``total``.
    """

    part: str
    ms: float
    rival_ms: float
    rival: str
    peak_bytes: float
    rival_peak_bytes: float
    alternations: int
    densities: dict[str, float]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same weights, so that one can be operated while the other stays dense."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)  # type: ignore[arg-type]


class InTurns:
    """Both sides of a model at one prompt.

    Times are those of a caller who waits for the answer. The dense side writes to a preallocated cache and
    takes the fastest backend of PyTorch's SDPA for the very shapes.

    Args:
        model: Operated.
        rival: Its dense twin.
        ids: (1, length) int64, the prompt.
        read: Densities since it was last called.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rival: PreTrainedModel,
        ids: torch.Tensor,
        read: Callable[[], dict[str, float]],
    ) -> None:
        self._model, self._rival, self._ids, self._read = model, rival, ids, read
        self._device, self._length = model.device, ids.shape[1]

    @torch.inference_mode()
    def measure(self, parts: list[str], seconds: Callable[[], float]) -> Iterator[Turns]:
        """Times of the parts asked for, as they are found.

        Args:
            parts: Of FIRST, STEP and GRAPHED. The last, which needs a GPU, is left out, with a message, where
                steps cannot be captured.
            seconds: Asked before each part: how long its turns may take.

        Raises:
            SurgeryError: A side's logits are not finite.
        """
        side = DenseModel(self._rival, self._length, self._length + ROOM)
        try:
            side.way = fastest(*models.random_states(self._rival, 1, self._length, self._length))[0]
            if FIRST in parts:
                yield self._first(side, seconds)
            if STEP in parts or GRAPHED in parts:
                yield from self._decode(side, [part for part in parts if part != FIRST], seconds)
        finally:
            side.close()

    def _first(self, side: DenseModel, seconds: Callable[[], float]) -> Turns:
        calls = (lambda: self._prompt()[0], lambda: self._dense_prompt(side)[0])
        logits, peaks = zip(*(self._peak(call, 0) for call in calls), strict=True)
        own, dense = (self._finite(found) for found in logits)
        change = float((own - dense).norm() / dense.norm())
        say(f"prompt of {self._length:,} tokens: the last logits differ from dense by {change:.1%}")
        return self._alternate(FIRST, side, calls, peaks, seconds())

    def _decode(self, side: DenseModel, parts: list[str], seconds: Callable[[], float]) -> Iterator[Turns]:
        last, before = self._ids[:, -1:], allocated(self._device)
        dense_cache = self._dense_prompt(side)[1]
        side.visible = self._length + 1
        side.way = fastest(*models.random_states(self._rival, 1, 1, side.visible))[0]
        dense_step = side.step(last, dense_cache)
        dense_bytes = allocated(self._device) - before
        cache = self._prompt()[1]
        own_bytes = allocated(self._device) - before - dense_bytes
        arguments = {"use_cache": True, cache_name(self._model): cache}

        def step() -> torch.Tensor:
            return self._model(last, **arguments).logits

        def peaks(calls: tuple[Callable[[], Any], ...]) -> tuple[float, ...]:
            return tuple(self._peak(c, o)[1] for c, o in zip(calls, (dense_bytes, own_bytes), strict=True))

        for logits in (step(), dense_step()):
            self._finite(logits)
        if STEP in parts:
            calls = (_several(step), _several(dense_step))
            yield self._alternate(STEP, side, calls, peaks(calls), seconds())
        if GRAPHED not in parts:
            return
        recorded = GraphedSteps(self._model, cache)
        replay = graphed(dense_step, self._device)
        try:
            self._finite(recorded.step(last))
        except SurgeryError as problem:
            say(f"no graph of the operated steps: {problem}")
            return
        calls = (_several(lambda: recorded.step(last)), _several(replay))
        yield self._alternate(GRAPHED, side, calls, peaks(calls), seconds())

    def _prompt(self) -> tuple[torch.Tensor, Any]:
        cache = models.fresh_cache(self._model, self._length + ROOM)
        return models.prefill(self._model, self._ids, cache), cache

    def _dense_prompt(self, side: DenseModel) -> tuple[torch.Tensor, Any]:
        cache = side.cache()
        return models.prefill(self._rival, self._ids, cache), cache

    def _peak(self, call: Callable[[], Any], others: int) -> tuple[Any, float]:
        """What a call returns, and peak memory, without bytes that belong to the other side."""
        forget_peak(self._device)
        return call(), peak_bytes(self._device) - others

    def _finite(self, logits: torch.Tensor) -> torch.Tensor:
        if not bool(logits.isfinite().all()):
            raise SurgeryError(f"{self._length} tokens: logits are not finite, nothing is timed.")
        return logits.float()

    def _alternate(
        self,
        part: str,
        side: DenseModel,
        calls: tuple[Callable[[], Any], ...],
        peaks: tuple[float, ...],
        seconds: float,
    ) -> Turns:
        """Times of both calls, operated first, in turns; who begins changes, so that neither gains by it."""
        found: tuple[list[float], list[float]] = ([], [])
        count = 1 if part == FIRST else STEPS
        self._read()
        for call in calls:  # once more than their checks, without caches of memory just emptied
            call()
        begin, order = time.perf_counter(), [0, 1]
        while len(found[0]) < LEAST or (len(found[0]) < MOST and time.perf_counter() - begin < seconds):
            for which in order:
                found[which].append(once(calls[which], self._device) / count)
            order.reverse()
        own, dense = map(statistics.median, found)
        return Turns(part, own, dense, side.way.name, *peaks, len(found[0]), self._read())


def _several(step: Callable[[], Any]) -> Callable[[], None]:
    """The steps of a turn."""

    def call() -> None:
        for _ in range(STEPS):
            step()

    return call
