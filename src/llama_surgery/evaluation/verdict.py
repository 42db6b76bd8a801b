"""Whether an operated model keeps what it must: by the bounds of what was measured, not by its means."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import Change, paired_change
from llama_surgery.evaluation.result import DENSE
from llama_surgery.evaluation.ruler.result import RulerResult

#: Fewer windows than this make no interval that could be trusted.
FEW_WINDOWS = 10
#: What the dense model scores less on than this, 0…1, says nothing about the operation.
FEW_POINTS = 0.1

State = Literal["kept", "exceeded", "open"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be lost at most; None where it does not matter.

    Attributes:
        perplexity: Relative increase of the perplexity: 0.01 is one percent.
        needles: Share of the needles that are answered no more, 0…1.
        ruler: Of the mean RULER score over tasks, all lengths together, 0…1: 0.03 is three points.
        ruler_single: Of the RULER score of any single task over all lengths, and of the mean over tasks at
            any single length, 0…1. Wider than ``ruler``, since each stands on fewer samples.
    """

    perplexity: float | None = None
    needles: float | None = None
    ruler: float | None = None
    ruler_single: float | None = None


def read_limits(path: Path) -> Limits:
    """Limits in a JSON file: fields of :class:`Limits`, at least one.

    Raises:
        SurgeryError: It cannot be read, or says something else.
    """
    names = [field.name for field in dataclasses.fields(Limits)]
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        numbers = all(type(limit) in (int, float) and limit >= 0 for limit in given.values())
        if given and given.keys() <= set(names) and numbers:
            return Limits(**given)
        problem = f"it holds {json.dumps(given)[:200]}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise SurgeryError(
        f"{path}: no limits ({problem}). Give a JSON file with one or more of {', '.join(names)}, such as "
        '{"perplexity": 0.01, "needles": 0.05, "ruler": 0.03, "ruler_single": 0.1}.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A loss with its 95% interval, held against a limit. Positive is worse than dense.

    Attributes:
        form: Name of the operated model.
        measure: ``perplexity``, ``needles``, ``RULER average``, ``RULER worst task``, ``RULER worst length``.
        where: The task or length that lost most, where one is meant.
        loss, low, high: Relative for perplexity, else of scores 0…1; None where nothing was measured.
        limit: What is allowed.
        count: Windows, prompts or samples.
        trusted: Whether there are enough of them for the interval to hold.
    """

    form: str
    measure: str
    where: str = ""
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float
    count: int = 0
    trusted: bool = True

    @property
    def state(self) -> State:
        """``kept`` or ``exceeded`` where the whole interval lies on one side of the limit, else ``open``."""
        if not self.trusted or self.low is None or self.high is None:
            return "open"
        return "kept" if self.high <= self.limit else "exceeded" if self.low > self.limit else "open"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "state": self.state}


def find(results: Mapping[str, Any], ruler: RulerResult | None, limits: Limits) -> list[Finding]:
    """One finding for every limit and operated model; one without numbers where nothing was measured.

    ``results`` are those of :meth:`~llama_surgery.evaluation.result.EvaluationResult.to_dict`, or empty.
    """
    measured = {own["name"]: own for own in results.get("operated", [])}
    found = []
    for form in dict.fromkeys([*measured, *(ruler.names if ruler else [])]):
        own = measured.get(form)
        if limits.perplexity is not None:
            found.append(_of_perplexity(form, own, limits.perplexity))
        if limits.needles is not None:
            # What the operated model alone answers does not make up for what it answers no more.
            answers = [(n["right"][DENSE], n["right"][form]) for n in results.get("needles", []) if own]
            rights = [(dense, dense and operated) for dense, operated in answers]
            pairs = [tuple([float(right) for right in side] for side in zip(*rights, strict=True))]
            lost = {"": paired_change(pairs)} if rights else {}
            found.append(_worst(form, "needles", lost, limits.needles))
        tasks = [] if ruler is None else telling_tasks(ruler)
        for measure, limit, by in (
            ("RULER average", limits.ruler, None),
            ("RULER worst task", limits.ruler_single, "task"),
            ("RULER worst length", limits.ruler_single, "length"),
        ):
            if limit is None:
                continue
            changes: Mapping[Any, Change] = {}
            if ruler is not None and by is None:
                average = ruler.average(form, tasks=tasks)
                changes = {} if average is None else {"": average}
            elif ruler is not None:
                changes = ruler.changes(form, str(by), tasks=tasks)
            found.append(_worst(form, measure, changes, limit))
    return found


def _of_perplexity(form: str, own: Mapping[str, Any] | None, limit: float) -> Finding:
    if own is None:
        return Finding(form=form, measure="perplexity", limit=limit)
    ratio = own["ratio"]
    loss, low, high = (ratio[name] - 1 for name in ("ratio", "low", "high"))
    return Finding(
        form=form, measure="perplexity", loss=loss, low=low, high=high, limit=limit,
        count=ratio["count"], trusted=ratio["count"] >= FEW_WINDOWS,
    )  # fmt: skip


def telling_tasks(result: RulerResult) -> list[str]:
    """Tasks on which the dense model scores enough for a loss to show."""
    scores = {task: result.scores(DENSE, task=task) for task in result.settings["tasks"]}
    return [task for task, own in scores.items() if own and sum(own) / len(own) >= FEW_POINTS]


def _worst(form: str, measure: str, changes: Mapping[Any, Change], limit: float) -> Finding:
    """The largest loss of several.

    Their intervals hold together, so whichever is really worst has lost at least as much as the largest of
    the lower ends, and at most as much as the largest of the upper ends.
    """
    if not changes:
        return Finding(form=form, measure=measure, limit=limit)
    parts = changes.values()
    return Finding(
        form=form,
        measure=measure,
        where=str(min(changes, key=lambda key: changes[key].difference)),
        loss=max(-change.difference for change in parts) + 0.0,  # no minus before a zero
        low=max(-change.high for change in parts),
        high=max(-change.low for change in parts),
        limit=limit,
        count=min(change.count for change in parts),
    )


def verdict(findings: Sequence[Finding]) -> State:
    """``exceeded`` if some limit is, ``kept`` if all are and there is one, else ``open``."""
    states = {finding.state for finding in findings}
    if "exceeded" in states:
        return "exceeded"
    return "kept" if states == {"kept"} else "open"
