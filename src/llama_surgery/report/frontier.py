"""Quality against measured density: of configurations in a CSV, and of rules that are compared."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.intervals import wilson
from llama_surgery.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    OPERATED,
    ORANGE,
    PERCENT,
    PURPLE,
    SKY,
    VERMILION,
    figure,
    to_svg,
)

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_COLOURS = (VERMILION, GREEN, PURPLE, ORANGE, SKY)
#: Shares of perplexity lost that the figure spans: beyond, differences no longer matter.
_LEAST, _MOST = 3e-4, 0.2
#: Densities that the figure spans.
_SPAN = (0.03, 0.65)


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One configuration, measured; the fields are the columns of the CSV.

    The first are those of the configuration. Densities are executed pairs over causal pairs.

    Attributes:
        scoring: Which rows score which balls: ``all rows``; in files of older releases others too.
        ppl_ratio: Perplexity over the dense model's on the same windows, with its 95% interval.
        needle, dense_needle: Shares of needles answered, operated and dense.
        windows, needles: Windows and prompts that were measured on, of ``length`` tokens.
    """

    page_size: int
    chunk_size: int
    window: int
    tile: int
    scoring: str
    theta: float
    far_density: float
    total_density: float
    ppl: float
    ppl_ratio: float
    ratio_low: float
    ratio_high: float
    needle: float
    dense_ppl: float
    dense_needle: float
    windows: int
    needles: int
    length: int
    seed: int
    model: str

    @property
    def needle_interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of ``needle``."""
        return wilson(self.needle, max(1, self.needles))


COLUMNS = tuple(field.name for field in dataclasses.fields(FrontierPoint))


def read_frontier(path: Path) -> list[FrontierPoint]:
    """Read the points of ``path``; columns that are not a point's are ignored.

    Raises:
        SurgeryError: The file is missing or empty, a column is missing or a value is not a number.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SurgeryError(f"could not read the frontier {path}: {error}.") from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise SurgeryError(
            f"{path}: columns {', '.join(missing)} are missing. A frontier has the columns "
            f"{', '.join(COLUMNS)}."
        )
    return [_point(path, line, row) for line, row in enumerate(rows, start=2)]


def _point(path: Path, line: int, row: dict[str, str]) -> FrontierPoint:
    values: dict[str, object] = {}
    for field in dataclasses.fields(FrontierPoint):
        text = row[field.name] or ""
        try:
            values[field.name] = field.type(text)  # type: ignore[operator]
        except ValueError as error:
            raise SurgeryError(f"{path}, line {line}: {field.name}={text!r} is not a number.") from error
    return FrontierPoint(**values)  # type: ignore[arg-type]


def pareto(points: list[FrontierPoint]) -> list[FrontierPoint]:
    """Points that no other point beats: none reads less and has a lower perplexity ratio.

    Returns:
        By rising far density, of equal ones only the best.
    """
    front: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.far_density, p.ppl_ratio)):
        if not front or point.ppl_ratio < front[-1].ppl_ratio:
            front.append(point)
    return front


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity lost to dense, and needles kept of those the dense model answered, against total density.

    Args:
        rows: Of :func:`llama_surgery.evaluation.compare_forms.row`; what was not measured is left out, and
            so are full budgets.

    Returns:
        An SVG element. Bars are 95% intervals; losses outside of what is drawn lie on its edge. Rules of
        which a row may see what later rows chose are dashed.
    """
    rows = [row for row in rows if row["target_density"] < 1]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    with figure(10.4, 6.2) as fig:
        left, right = fig.subplots(1, 2)
        rest = 0
        for title in titles:
            own = [row for row in rows if row["title"] == title]
            form = own[0]["form"]
            if form in ("pages", "learned"):
                style: dict[str, Any] = {"color": BLUE, "marker": "o", "lw": 2.6, "ms": 6, "zorder": 5}
                if form == "learned":
                    style |= {"lw": 1.8, "mfc": "white"}
            elif "oracle" in form:
                style = {"color": INK if "block" in form else GREY, "marker": "*", "lw": 1.2, "ms": 7}
            else:
                colour, marker = _COLOURS[rest % len(_COLOURS)], _MARKERS[rest % len(_MARKERS)]
                style, rest = {"color": colour, "marker": marker, "lw": 1.3, "ms": 5}, rest + 1
            style |= {"ls": "--" if own[0]["ahead"] else "-", "elinewidth": 0.7, "label": title}
            lost = [(row["total_density"], *_lost(row)) for row in own if row.get("perplexity_ratio")]
            names = ("prefill_density", "needle_kept", "needle_kept_low", "needle_kept_high")
            kept = [tuple(row[name] for name in names) for row in own if row.get("needle_kept") is not None]
            _bars(left, lost, **style)
            _bars(right, kept, **style)
        left.set_yscale("log")
        left.set_ylim(_LEAST, _MOST)
        left.set_yticks([0.001, 0.003, 0.01, 0.03, 0.1])
        left.yaxis.set_minor_formatter(NullFormatter())
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xlim(*_SPAN)
            panel.xaxis.set_major_formatter(PERCENT)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xticks([0.05, 0.1, 0.2, 0.5])
            panel.yaxis.set_major_formatter(PERCENT)
        left.set_xlabel("total density, near field and summaries included")
        left.set_title("Perplexity lost (lower is better)")
        right.axhline(1, color=GREY, lw=1.2, ls=":")
        right.set_xlabel("total density of the prompts, summaries included")
        right.set_title("Needles kept (higher is better)")
        handles, labels = left.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)
        return to_svg(fig, f"Quality against measured density of {len(titles)} selection rules")


def frontier(points: Sequence[FrontierPoint]) -> str:
    """Perplexity ratio and needle accuracy against executed far density, the Pareto front marked."""
    front = pareto(list(points))
    tiles, sizes = (sorted({getattr(p, name) for p in points}) for name in ("tile", "page_size"))
    colour = {tile: OPERATED[i % len(OPERATED)] for i, tile in enumerate(tiles)}
    marker = {size: ("o", *_MARKERS)[i % 7] for i, size in enumerate(sizes)}
    with figure(10.4, 4.7) as fig:
        left, right = fig.subplots(1, 2)
        for panel, name in ((left, "ppl_ratio"), (right, "needle")):
            for p in points:
                low, high = (p.ratio_low, p.ratio_high) if panel is left else p.needle_interval
                point, own = (p.far_density, getattr(p, name)), colour[p.tile]
                _bars(panel, [(*point, low, high)], fmt="none", ecolor=own, elinewidth=0.8, alpha=0.35)
                panel.plot(*point, marker[p.page_size], color=own, ms=6, mec="white", mew=0.6)
            density, quality = ([getattr(p, key) for p in front] for key in ("far_density", name))
            panel.plot(density, quality, "o", ms=12, mfc="none", mec=INK, mew=1.1)
            if panel is left:
                panel.plot(density, quality, color=INK, lw=0.9)
            panel.set_xlabel("executed far density")
            panel.set_xlim(left=0)
            panel.xaxis.set_major_formatter(PERCENT)
        left.axhline(1, color=GREY, lw=1.2, ls="--")
        left.set_title("Perplexity ÷ dense (lower is better)")
        for value in {round(p.dense_needle, 4) for p in points}:
            right.axhline(value, color=GREY, lw=1.2, ls="--")
        right.set_title("Needles answered (higher is better)")
        right.yaxis.set_major_formatter(PERCENT)
        handles = [Line2D([], [], ls="none", marker="o", color=colour[t], label=f"tile {t}") for t in tiles]
        handles += [
            *(Line2D([], [], ls="none", marker=marker[s], color=GREY, label=f"page {s}") for s in sizes),
            Line2D([], [], color=GREY, ls="--", lw=1.2, label="dense"),
            Line2D([], [], ls="none", marker="o", ms=10, mfc="none", mec=INK, label="Pareto front"),
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
        told = f"Perplexity ratio and needle accuracy of {len(points)} configurations against density"
        return to_svg(fig, told)


def _lost(row: Mapping[str, Any]) -> list[float]:
    """Perplexity lost to dense and its interval, as far as the figure reaches."""
    ratios = (row[name] for name in ("perplexity_ratio", "ratio_low", "ratio_high"))
    return [min(max(ratio - 1, _LEAST), _MOST) for ratio in ratios]


def _bars(panel: Axes, points: Sequence[tuple[float, ...]], **style: Any) -> None:
    """Points with intervals, each x, y, low and high, by rising x."""
    x, y, low, high = zip(*sorted(points), strict=True) if points else ([], [], [], [])
    below = [max(0.0, at - end) for at, end in zip(y, low, strict=True)]
    above = [max(0.0, end - at) for at, end in zip(y, high, strict=True)]
    panel.errorbar(x, y, yerr=[below, above], **style)
