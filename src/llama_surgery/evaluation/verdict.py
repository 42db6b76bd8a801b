"""Whether an operated model keeps what it must: by the bounds of what was measured, not by its means."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llama_surgery.evaluation.intervals import Change
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import RulerResult

#: Fewer windows than this make no interval that could be trusted.
FEW_WINDOWS = 10
#: What the dense model scores less on than this, 0…1, says nothing about the operation.
FEW_POINTS = 0.1

#: What is held against a limit.
MEASURES = ("perplexity", "RULER average", "RULER worst task", "RULER worst length")

State = Literal["kept", "exceeded", "open"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be lost at most.

    Attributes:
        perplexity: Relative increase of the perplexity at a length: 0.01 is one percent.
        average: Of the mean RULER score over tasks, all lengths together, 0…1: 0.03 is three points.
        single: Of the RULER score of any single task over all lengths, and of the mean over tasks at any
            single length, 0…1. Wider than ``average``, since each stands on fewer samples.
    """

    perplexity: float = 0.01
    average: float = 0.03
    single: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A loss with its 95% interval, held against a limit. Positive is worse than dense.

    Attributes:
        measure: One of :data:`MEASURES`.
        length: Tokens; None over all lengths. Of a worst length, the one that lost most.
        task: The task that lost most, where one is meant.
        loss, low, high: Relative for perplexity, of scores 0…1 for RULER.
        limit: What is allowed.
        count: Windows or samples.
        trusted: Whether there are enough of them for the interval to hold.
    """

    measure: str
    length: int | None
    task: str | None = None
    loss: float
    low: float
    high: float
    limit: float
    count: int
    trusted: bool = True

    @property
    def state(self) -> State:
        """``kept`` or ``exceeded`` where the whole interval lies on one side of the limit, else ``open``."""
        if not self.trusted:
            return "open"
        return "kept" if self.high <= self.limit else "exceeded" if self.low > self.limit else "open"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "state": self.state}


def text_finding(length: int, ratio: Mapping[str, Any], limits: Limits) -> Finding:
    """Perplexity at a length.

    Args:
        length: Tokens of a window.
        ratio: Fields of :class:`~llama_surgery.evaluation.paired.RatioInterval`.
        limits: What is allowed.
    """
    return Finding(
        measure=MEASURES[0],
        length=length,
        loss=ratio["ratio"] - 1,
        low=ratio["low"] - 1,
        high=ratio["high"] - 1,
        limit=limits.perplexity,
        count=ratio["count"],
        trusted=ratio["count"] >= FEW_WINDOWS,
    )


def telling_tasks(result: RulerResult) -> list[str]:
    """Tasks on which the dense model scores enough for a loss to show."""
    scores = {task: result.scores(DENSE, task=task) for task in result.settings["tasks"]}
    return [task for task, own in scores.items() if own and sum(own) / len(own) >= FEW_POINTS]


def ruler_findings(result: RulerResult, name: str, limits: Limits) -> list[Finding]:
    """The average, the worst task over all lengths, and the worst length over all tasks.

    Args:
        result: Dense and operated on the same samples.
        name: Of the operated form.
        limits: What is allowed.
    """
    tasks = telling_tasks(result)
    average = result.average(name, tasks=tasks)
    if average is None:
        return []
    by_task = result.changes(name, "task", tasks=tasks)
    by_length = result.changes(name, "length", tasks=tasks)
    task, length = (min(by, key=lambda key: by[key].difference) for by in (by_task, by_length))
    return [
        _worst(MEASURES[1], {None: average}, limits.average),
        _worst(MEASURES[2], by_task, limits.single, task=task),
        _worst(MEASURES[3], by_length, limits.single, length=length),
    ]


def _worst(
    measure: str,
    changes: Mapping[Any, Change],
    limit: float,
    task: str | None = None,
    length: int | None = None,
) -> Finding:
    """The largest loss of several.

    Their intervals hold together, so whichever is really worst has lost at least as much as the largest of
    the lower ends, and at most as much as the largest of the upper ends.
    """
    parts = changes.values()
    return Finding(
        measure=measure,
        length=length,
        task=task,
        loss=max(-change.difference for change in parts),
        low=max(-change.high for change in parts),
        high=max(-change.low for change in parts),
        limit=limit,
        count=min(change.count for change in parts),
    )


def verdict(findings: Sequence[Finding]) -> State:
    """``exceeded`` if some limit is, ``kept`` if all are and each was measured, else ``open``."""
    states = {finding.state for finding in findings}
    if "exceeded" in states:
        return "exceeded"
    return "kept" if states == {"kept"} and not unmeasured(findings) else "open"


def unmeasured(findings: Sequence[Finding]) -> list[str]:
    """Measures that have a limit but no finding."""
    return [measure for measure in MEASURES if measure not in {finding.measure for finding in findings}]
