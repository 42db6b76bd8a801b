"""What a run found, cell by cell, and the tables made of it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from llama_surgery.evaluation.intervals import Change, mean_interval, paired_change
from llama_surgery.evaluation.result import DENSE


@dataclasses.dataclass
class Cell:
    """Samples 0, 1, … of one task at one length, answered by one model.

    Attributes:
        name: ``dense`` or the name of a configuration.
        task: The task.
        length: Tokens of prompt and answer.
        scores: 0…1, in the order of the samples.
        answers: What was written.
        seconds: Wall time of all answers together.
        pairs: (query, key) pairs read, and causal pairs, in prefill and decode; empty for ``dense``.
    """

    name: str
    task: str
    length: int
    scores: list[float] = dataclasses.field(default_factory=list)
    answers: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    pairs: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, more: Mapping[str, Any]) -> None:
        """Further samples: fields of a cell."""
        self.scores += more["scores"]
        self.answers += more["answers"]
        self.seconds += more["seconds"]
        for name, pairs in more["pairs"].items():
            self.pairs[name] = self.pairs.get(name, 0.0) + pairs


@dataclasses.dataclass
class RulerResult:
    """A dense model and its operated forms on the same samples.

    Attributes:
        settings: All that decides the scores: model, configurations, tasks, lengths, seed, versions.
        cells: In the order in which they were begun.
    """

    settings: dict[str, Any]
    cells: list[Cell] = dataclasses.field(default_factory=list)

    def cell(self, name: str, task: str, length: int) -> Cell:
        """The cell of that model, task and length; an empty one is added where there is none."""
        for cell in self.cells:
            if (cell.name, cell.task, cell.length) == (name, task, length):
                return cell
        self.cells.append(Cell(name, task, length))
        return self.cells[-1]

    @property
    def names(self) -> list[str]:
        """The operated forms."""
        return [name for name in self.settings["configs"] if name != DENSE]

    @property
    def complete(self) -> bool:
        """Whether every cell has all its samples."""
        wanted = (1 + len(self.names)) * len(self.settings["tasks"]) * len(self.settings["lengths"])
        full = [cell for cell in self.cells if len(cell.scores) == self.settings["samples"]]
        return len(full) == wanted

    def scores(self, name: str, *, task: str | None = None, length: int | None = None) -> list[float]:
        """Scores 0…1 of a model's samples, of one task and one length or of all."""
        return [score for cell in self._chosen(name, task, length) for score in cell.scores]

    def density(self, name: str, *, task: str | None = None, length: int | None = None) -> float:
        """Pairs read over causal pairs, of one task and one length or of all."""
        cells = [cell.pairs for cell in self._chosen(name, task, length) if cell.pairs]
        causal = sum(pairs["causal"] for pairs in cells)
        return sum(pairs["read"] for pairs in cells) / causal if causal else 1.0

    def _chosen(self, name: str, task: str | None, length: int | None) -> list[Cell]:
        return [
            cell
            for cell in self.cells
            if cell.name == name and task in (None, cell.task) and length in (None, cell.length)
        ]

    def pairs(
        self, name: str, *, task: str | None = None, length: int | None = None
    ) -> dict[tuple[str, int], tuple[list[float], list[float]]]:
        """Dense and operated scores by task and length, of the samples that both have answered."""
        found = {}
        for cell in self._chosen(name, task, length):
            dense = self.scores(DENSE, task=cell.task, length=cell.length)
            both = min(len(dense), len(cell.scores))
            if both:
                found[cell.task, cell.length] = (dense[:both], cell.scores[:both])
        return found

    def _groups(
        self, name: str, by: str, tasks: Iterable[str] | None, length: int | None
    ) -> dict[Any, list[tuple[list[float], list[float]]]]:
        """:meth:`pairs` of each ``task``, as one group, or of each ``length``, a group for every task."""
        groups: dict[Any, list[tuple[list[float], list[float]]]] = {}
        for (task, own), scores in self.pairs(name, length=length).items():
            if tasks is None or task in tasks:
                groups.setdefault(task if by == "task" else own, []).append(scores)
        if by == "length":
            return groups
        return {
            task: [([s for dense, _ in parts for s in dense], [s for _, after in parts for s in after])]
            for task, parts in groups.items()
        }

    def changes(
        self, name: str, by: str, *, tasks: Iterable[str] | None = None, length: int | None = None
    ) -> dict[Any, Change]:
        """Changes by ``task`` (over lengths) or by ``length`` (over tasks), intervals that hold together.

        ``tasks`` and ``length`` say what counts; all if None.
        """
        groups = self._groups(name, by, tasks, length)
        return {key: paired_change(parts, comparisons=len(groups)) for key, parts in groups.items()}

    def average(
        self, name: str, *, tasks: Iterable[str] | None = None, length: int | None = None
    ) -> Change | None:
        """Mean over tasks, each task's samples of all lengths together; None where nothing was answered."""
        groups = self._groups(name, "task", tasks, length)
        return paired_change([part for (part,) in groups.values()]) if groups else None

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a cell, with interval, and paired with the dense one where it is not that itself."""
        rows = []
        for cell in self.cells:
            if not cell.scores:
                continue
            mean, low, high = mean_interval(cell.scores)
            row = {"name": cell.name, "task": cell.task, "length": cell.length, "samples": len(cell.scores)}
            row |= {"score": 100 * mean, "score_low": 100 * low, "score_high": 100 * high}
            row |= {
                "seconds": cell.seconds,
                "total_density": self.density(cell.name, task=cell.task, length=cell.length),
            }
            paired = self.pairs(cell.name, task=cell.task, length=cell.length)
            if cell.name != DENSE and paired:
                change = paired_change(list(paired.values()))
                row |= {"difference": 100 * change.difference, "difference_low": 100 * change.low}
                row |= {"difference_high": 100 * change.high, "lost": change.lost, "won": change.won}
            rows.append({**row, "model": self.settings["model"], "seed": self.settings["seed"]})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Settings, cells and summaries, ready for JSON."""
        summaries = {
            name: {
                "average": None if (average := self.average(name)) is None else dataclasses.asdict(average),
                **{
                    f"by_{by}": {str(key): dataclasses.asdict(c) for key, c in self.changes(name, by).items()}
                    for by in ("task", "length")
                },
            }
            for name in self.names
        }
        return {
            "settings": self.settings,
            "complete": self.complete,
            "summaries": summaries,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }
