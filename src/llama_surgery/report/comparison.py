"""The figure of a comparison: quality against measured density, for every rule."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from llama_surgery.report.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, figure, to_svg

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_COLOURS = (VERMILION, GREEN, PURPLE, ORANGE, SKY)
#: Shares of perplexity lost that the figure spans: beyond, differences no longer matter.
_LEAST, _MOST = 3e-4, 0.2
#: Densities that the figure spans.
_SPAN = (0.03, 0.65)


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity lost to dense, and needles kept of those the dense model answered, against total density.

    Args:
        rows: Of :func:`llama_surgery.evaluation.compare_result.row`; what was not measured is left out, and
            so are full budgets.

    Returns:
        An SVG element. Bars are 95% intervals; losses outside of what is drawn lie on its edge. Rules of
        which a row may see what later rows chose are dashed.
    """
    rows = [row for row in rows if row["target_density"] < 1]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    with figure(10.4, 6.2) as fig:
        panels = fig.subplots(1, 2)
        rest = 0
        for title in titles:
            own = [row for row in rows if row["title"] == title]
            if own[0]["form"] in ("pages", "learned"):
                style: dict[str, Any] = {"color": BLUE, "marker": "o", "lw": 2.6, "ms": 6, "zorder": 5}
                if own[0]["form"] == "learned":
                    style |= {"lw": 1.8, "mfc": "white"}
            elif "oracle" in own[0]["form"]:
                style = {
                    "color": INK if "block" in own[0]["form"] else GREY,
                    "marker": "*",
                    "lw": 1.2,
                    "ms": 7,
                }
            else:
                colour, marker = _COLOURS[rest % len(_COLOURS)], _MARKERS[rest % len(_MARKERS)]
                style, rest = {"color": colour, "marker": marker, "lw": 1.3, "ms": 5}, rest + 1
            style["ls"] = "--" if own[0]["ahead"] else "-"
            for panel, density, name, low, high in (
                (panels[0], "total_density", "perplexity_ratio", "ratio_low", "ratio_high"),
                (panels[1], "prefill_density", "needle_kept", "needle_kept_low", "needle_kept_high"),
            ):
                points = [row for row in own if row.get(name) is not None]
                points.sort(key=lambda row, density=density: row[density])
                x = [row[density] for row in points]
                y, bottom, top = ([_drawn(name, row[key]) for row in points] for key in (name, low, high))
                below = [max(0.0, at - end) for at, end in zip(y, bottom, strict=True)]
                above = [max(0.0, end - at) for at, end in zip(y, top, strict=True)]
                panel.errorbar(x, y, yerr=[below, above], elinewidth=0.7, label=title, **style)
        for panel in panels:
            panel.set_xscale("log")
            panel.set_xlim(*_SPAN)
            panel.xaxis.set_major_formatter(_percent)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xticks([0.05, 0.1, 0.2, 0.5])
        panels[1].axhline(1, color=GREY, lw=1.2, ls=":")
        panels[0].set_xlabel("total density, near field and summaries included")
        panels[1].set_xlabel("total density of the prompts, summaries included")
        panels[0].set_yscale("log")
        panels[0].set_ylim(_LEAST, _MOST)
        panels[0].set_yticks([0.001, 0.003, 0.01, 0.03, 0.1])
        panels[0].yaxis.set_major_formatter(_percent)
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        panels[0].set_title("Perplexity lost (lower is better)")
        panels[1].set_title("Needles kept (higher is better)")
        panels[1].yaxis.set_major_formatter(_percent)
        handles, labels = panels[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)
        return to_svg(fig, f"Quality against measured density of {len(titles)} selection rules")


def _drawn(name: str, value: float) -> float:
    """Where a measure is drawn: perplexity over dense as what is lost, within the figure."""
    return min(max(value - 1, _LEAST), _MOST) if name == "perplexity_ratio" else value


_percent = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
