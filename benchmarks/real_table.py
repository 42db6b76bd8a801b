"""The table of benchmarks/real.py, made of all raw results there are, and the targets for it."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from csv_tables import merge
from real_results import FORMS, NEEDLE, RULER, WINDOW, Found, Results, canonical

from llama_surgery.evaluation.intervals import (
    Change,
    RatioInterval,
    paired_change,
    paired_difference,
    perplexity_ratio,
)

COLUMNS = (
    *("model", "length", "text", "form", "settings", "far_density", "total_density"),
    *("ratio", "ratio_low", "ratio_high", "needles_dense", "needles_kept", "ruler_dense", "ruler"),
    *("worst_task", "worst_change", "windows", "samples", "seed", "device", "date"),
)
#: What tells rows apart.
KEYS = COLUMNS[:5]
#: RULER tasks on which the dense model scores less, of 100, do not count: no loss could show.
TELLING = 20.0

#: Targets: perplexity over dense, the same with learned corrections, the bound of the needles' difference,
#: RULER points, far density, and total density by length.
MOST_RATIO, MOST_LEARNED, LEAST_NEEDLES, MOST_POINTS, MOST_FAR = 1.010, 1.005, -0.05, 3.0, 0.06
MOST_TOTAL = {8192: 0.19, 16384: 0.14, 32768: 0.11}
_NOTHING = "not measured"


class Measured:
    """One form with one set of settings against the dense model, on what both were measured on.

    Args:
        results: Of the study.
        form: Name of the form.
        settings: Its settings.
    """

    def __init__(self, results: Results, form: str, settings: dict[str, Any]) -> None:
        self.study, self.form, self.settings = results.settings, form, settings
        dense = [results.items("dense", given) for given in results.listed("dense")]
        self._dense = dense[0] if dense else {}
        self._found = results.items(form, settings)

    def _pairs(self, kind: str, what: str) -> tuple[list[Any], list[Any]]:
        """What the dense model and this form have of the items that both have, in order."""
        both = sorted(item for item in self._found if item in self._dense and item.startswith(f"{kind} "))
        return [self._dense[item][what] for item in both], [self._found[item][what] for item in both]

    @property
    def windows(self) -> int:
        return len(self._pairs(WINDOW, "loss")[0])

    def density(self, what: str) -> float | None:
        """Mean over windows of ``far`` or ``total`` density; None where it is not known."""
        if self.form in ("dense", "rounding"):
            return 1.0 if what == "total" else None
        known = [found[what] for found in self._found.values() if what in found]
        return math.fsum(known) / len(known) if known else None

    @functools.cached_property
    def ratio(self) -> RatioInterval | None:
        """Perplexity over the dense model's."""
        dense, own = self._pairs(WINDOW, "loss")
        return perplexity_ratio(dense, own) if dense else None

    @functools.cached_property
    def needles(self) -> Change | None:
        """Answers of all prompts."""
        dense, own = self._pairs(NEEDLE, "right")
        return paired_difference(dense, own) if dense else None

    @functools.cached_property
    def scores(self) -> dict[str, tuple[list[float], list[float]]]:
        """RULER scores by task, the dense model's and these, where dense scores enough for a loss to show."""
        found = {}
        names = dict.fromkeys(item.split()[1] for item in self._dense if item.startswith(f"{RULER} "))
        for name in names:
            dense, own = self._pairs(f"{RULER} {name}", "score")
            scores = [f["score"] for item, f in self._dense.items() if item.startswith(f"{RULER} {name} ")]
            if dense and 100 * math.fsum(scores) / len(scores) >= TELLING:
                found[name] = dense, own
        return found

    @functools.cached_property
    def tasks(self) -> dict[str, Change]:
        """RULER by task."""
        return {name: paired_change([both]) for name, both in self.scores.items()}

    @property
    def about(self) -> tuple[str, str]:
        """Devices, and the last day."""
        found: list[Found] = list(self._found.values())
        devices = dict.fromkeys(line["device"] for line in found)
        return "; ".join(devices), max((line["date"] for line in found), default="")

    def row(self) -> dict[str, Any]:
        """The line of the table. What was not measured is blank, and what would compare dense with dense."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {name: self.study[name] for name in ("model", "length", "text", "seed")}
        row |= {"form": self.form, "settings": canonical(self.settings), "windows": self.windows}
        row |= {f"{what}_density": _rounded(self.density(what)) for what in ("far", "total")}
        compared = self.form != "dense"
        if self.ratio and compared:
            row |= {"ratio": _rounded(self.ratio.ratio), "ratio_low": _rounded(self.ratio.low)}
            row["ratio_high"] = _rounded(self.ratio.high)
        if self.needles:
            row["needles_dense"] = _rounded(self.needles.dense)
            if compared and self.needles.dense:
                row["needles_kept"] = _rounded(1 - self.needles.lost / _answered(self.needles))
        tasks = self.tasks
        row["samples"] = sum(change.count for change in tasks.values())
        if tasks:
            row["ruler_dense"], row["ruler"] = (_rounded(score) for score in pooled(tasks))
            if compared:
                row["worst_task"] = min(tasks, key=lambda name: tasks[name].difference)
                row["worst_change"] = _rounded(100 * tasks[row["worst_task"]].difference)
        row["device"], row["date"] = self.about
        return row

    def told(self) -> str:
        """The line as text, with how many there were of each, and gains beside losses."""
        parts = [f"{self.form} {canonical(self.settings)}:"]
        if self.form == "dense":
            losses = self._pairs(WINDOW, "loss")[0]
            if losses:
                parts.append(
                    f"perplexity {math.exp(math.fsum(losses) / len(losses)):.3f}, {len(losses)} windows;"
                )
            if self.needles:
                parts.append(f"needles {_answered(self.needles)} of {self.needles.count};")
            scores = (f"{name} {100 * change.dense:.0f}" for name, change in self.tasks.items())
            parts.append(f"RULER, tasks that count: {', '.join(scores) or 'none'}")
            return " ".join(parts)
        far, total = self.density("far"), self.density("total")
        if self.form != "rounding" and total is not None:
            parts.append(f"total density {total:.3f}" + ("" if far is None else f" (far {far:.3f})") + ";")
        if self.ratio:
            shown = f"÷ dense {self.ratio.ratio:.4f} ({self.ratio.low:.4f} … {self.ratio.high:.4f})"
            parts.append(f"{shown}, {self.windows} windows;")
        if self.needles:
            answered, asked = _answered(self.needles), self.needles.count
            parts.append(f"needles: dense {answered} of {asked}, kept {answered - self.needles.lost},")
            parts.append(f"gained {self.needles.won}, difference at least {self.needles.low:+.1%};")
        if self.tasks:
            dense, own = pooled(self.tasks)
            worst = min(self.tasks, key=lambda name: self.tasks[name].difference)
            parts.append(f"RULER, mean of {len(self.tasks)} tasks: dense {dense:.1f}, here {own:.1f},")
            parts.append(f"worst {worst} {100 * self.tasks[worst].difference:+.1f};")
        return " ".join(parts).removesuffix(";").removesuffix(":")


def measured(results: Results) -> Iterator[Measured]:
    """All that is there of a study, in order of the table."""
    for form in FORMS:
        for settings in results.listed(form):
            yield Measured(results, form, settings)


def pooled(tasks: dict[str, Change]) -> tuple[float, float]:
    """Mean scores over tasks, of 100: of the dense model and of a form."""
    dense, own = (math.fsum(getattr(c, side) for c in tasks.values()) for side in ("dense", "operated"))
    return 100 * dense / len(tasks), 100 * own / len(tasks)


def update(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts rows into the CSV in place of those of the same name; others stay."""

    def place(key: tuple[str, ...]) -> tuple[Any, ...]:
        model, length, text, form, settings = key
        return model, int(length), text, FORMS.index(form), settings

    merge(file, rows, COLUMNS, KEYS, place)


def check(found: Measured) -> Iterator[tuple[bool, str]]:
    """Every target of an operated model: whether it is met, and what was found."""
    ratio, needles, tasks, length = found.ratio, found.needles, found.tasks, found.study["length"]
    most_ratio = MOST_LEARNED if "learned" in found.settings else MOST_RATIO
    yield (
        ratio is not None and ratio.ratio <= most_ratio,
        f"perplexity at most {most_ratio:.3f} × dense: "
        + (f"{ratio.ratio:.4f} ({ratio.low:.4f} … {ratio.high:.4f})" if ratio else _NOTHING),
    )
    yield (
        needles is not None and needles.low > LEAST_NEEDLES,
        f"needles, difference above {100 * LEAST_NEEDLES:.0f} points with 95% confidence: "
        + (
            f"{100 * needles.difference:+.1f}, above {100 * needles.low:+.1f}, of {needles.count}"
            if needles
            else _NOTHING
        ),
    )
    dense, own = pooled(tasks) if tasks else (0.0, 0.0)
    yield (
        bool(tasks) and own >= dense - MOST_POINTS,
        f"RULER at most {MOST_POINTS:.0f} points under dense: "
        + (f"{own:.1f} against {dense:.1f}, {len(tasks)} tasks" if tasks else _NOTHING),
    )
    for what, most in (("far", MOST_FAR), ("total", MOST_TOTAL.get(length))):
        density = found.density(what)
        if most is not None:
            yield (
                density is not None and density <= most,
                f"{what} density at most {most}: {_NOTHING if density is None else f'{density:.4f}'}",
            )


def ruler_of_all(found: Sequence[Measured]) -> str | None:
    """RULER of several models with learned corrections together, every task alike.

    Of a model the longest length counts, and of its budgets the largest far density that is allowed. None
    where there is no such model.
    """
    last: dict[str, Measured] = {}
    for one in sorted(found, key=lambda one: (one.study["length"], one.density("far") or 0.0)):
        right = "learned" in one.settings and one.settings.get("decode") == "dense" and one.scores
        if right and (one.density("far") or 1.0) <= MOST_FAR:
            last[one.study["model"]] = one
    groups = [both for one in last.values() for both in one.scores.values()]
    if not groups:
        return None
    change = paired_change(groups)
    low, points, high = (100 * value for value in (change.low, change.difference, change.high))
    return (
        f"RULER of {', '.join(last)} together, learned: {points:+.1f} points ({low:+.1f} … {high:+.1f}), "
        f"{len(groups)} tasks, {change.count} samples"
    )


def _answered(needles: Change) -> int:
    return round(needles.dense * needles.count)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
