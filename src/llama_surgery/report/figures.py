"""The report's figures. Each takes plain numbers and returns an inline SVG."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from llama_surgery.report.style import (
    AMOUNT,
    BLUE,
    GREY,
    OPERATED,
    PALE,
    PERCENT,
    SKY,
    figure,
    shade_text,
    to_svg,
)

#: The ratio axis spans at least this much above 1: a loss of a thousandth must not look like a cliff.
RATIO_SHOWN = 0.01


class NeedleCell(NamedTuple):
    """Of prompts of one length, tokens, and one depth, the middle of a bin in 0 … 1: answered, and asked."""

    length: int
    depth: float
    right: int
    asked: int


def needle_grids(grids: Mapping[str, Sequence[NeedleCell]]) -> str:
    """Needle accuracy by depth and context length, one panel for each model, side by side."""
    lengths = sorted({c.length for cells in grids.values() for c in cells})
    depths = sorted({c.depth for cells in grids.values() for c in cells})
    with figure(10.4, 1.5 + 0.42 * len(depths)) as fig:
        panels = fig.subplots(1, len(grids), sharey=True, squeeze=False)[0]
        for panel, (name, cells) in zip(panels, grids.items(), strict=True):
            found = {(c.depth, c.length): c for c in cells}
            shares, texts = [], []
            for depth in depths:
                row = [found.get((depth, length)) for length in lengths]
                shares.append([c.right / c.asked if c and c.asked else None for c in row])
                texts.append([f"{c.right}/{c.asked}" if c and c.asked else "" for c in row])
            _heat(panel, shares, texts, top=1.0)
            panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            panel.set_xlabel("context length, tokens")
            right, count = sum(c.right for c in cells), sum(c.asked for c in cells)
            panel.set_title(f"{name}: {right}/{count}")
        panels[0].set_ylabel("depth of the fact")
        return to_svg(fig, "Needles answered by depth and context length: " + ", ".join(grids))


def head_density(by_layer: dict[int, dict[str, Any]]) -> str:
    """Executed far density of every layer and KV head."""
    layers = sorted(by_layer)
    rows = [by_layer[layer]["far_density"] for layer in layers]
    heads = len(rows[0])
    top = max(max(row) for row in rows) or 1.0
    readable = heads <= 16
    with figure(5.1, 1.3 + 0.34 * len(layers)) as fig:
        panel = fig.subplots()
        texts = [[f"{100 * v:.1f}" if readable else "" for v in row] for row in rows]
        image = _heat(panel, rows, texts, top=top)
        panel.set_xticks(range(heads) if readable else range(0, heads, 4))
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        panel.set_xlabel("KV head")
        panel.set_ylabel("layer")
        panel.set_title("Far density by KV head, %" if readable else "Far density by KV head")
        fig.colorbar(image, ax=panel, format=PERCENT, pad=0.02).outline.set_visible(False)
        return to_svg(fig, "Executed far density of every layer and KV head")


def layer_density(by_layer: dict[int, dict[str, Any]]) -> str:
    """Near and far density of every layer, and that of summaries, stacked; older results lack these."""
    layers = sorted(by_layer)
    near = [by_layer[layer]["near_density"] for layer in layers]
    far = [fmean(by_layer[layer]["far_density"]) for layer in layers]
    means = [by_layer[layer].get("summary_density", 0.0) for layer in layers]
    with figure(5.1, 1.3 + 0.34 * len(layers)) as fig:
        panel = fig.subplots()
        places = range(len(layers))
        panel.barh(places, near, color=PALE, label="near field")
        panel.barh(places, far, left=near, color=BLUE, label="far field")
        read = [n + f for n, f in zip(near, far, strict=True)]
        panel.barh(places, means, left=read, color=SKY, label="summaries")
        for place, total in enumerate(r + m for r, m in zip(read, means, strict=True)):
            panel.annotate(f"{total:.1%}", (total, place), (4, 0), textcoords="offset points", va="center")
        panel.set_yticks(places, [str(layer) for layer in layers])
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.16)
        panel.set_xlabel("density, share of the causal pairs")
        panel.set_ylabel("layer")
        panel.xaxis.set_major_formatter(PERCENT)
        panel.set_title("Density by layer")
        fig.legend(loc="outside lower right", ncols=3)
        return to_svg(fig, "Near and far density, and that of summaries, of every layer")


def position_perplexity(
    bins: Sequence[tuple[int, int]], dense: Sequence[float], operated: Mapping[str, Sequence[float]]
) -> str:
    """Perplexity by position in the window, and its ratio to the dense model's.

    ``bins`` are their first positions and one past the last, ``dense`` and each of ``operated`` their values.
    """
    places = range(len(bins))
    with figure(10.4, 3.5) as fig:
        left, right = fig.subplots(1, 2)
        left.plot(places, dense, color=GREY, marker="o", ms=5, label="dense")
        for (name, values), colour in zip(operated.items(), OPERATED, strict=False):
            left.plot(places, values, color=colour, marker="o", ms=5, ls="--", label=name)
            ratios = [v / d for v, d in zip(values, dense, strict=True)]
            right.plot(places, ratios, color=colour, marker="o", ms=5, label=name)
        right.axhline(1, color=GREY, lw=1.8)
        low, high = right.get_ylim()
        right.set_ylim(min(low, 1 - RATIO_SHOWN / 5), max(high, 1 + RATIO_SHOWN))
        left.set_title("Perplexity")
        right.set_title("Perplexity ÷ dense")
        for panel in (left, right):
            panel.set_xlabel("positions in the window, tokens")
            panel.set_xticks(places, [f"…{stop:,}" for _, stop in bins])
        left.legend()
        return to_svg(fig, "Perplexity by position in the window, dense and operated")


def _heat(panel: Axes, values: Sequence[Sequence[float | None]], texts: list[list[str]], top: float) -> Any:
    shown = [[float("nan") if v is None else v for v in row] for row in values]
    panel.set_facecolor(PALE)  # where nothing was measured: not to be taken for zero
    image = panel.imshow(shown, cmap=AMOUNT, vmin=0, vmax=top, aspect="auto")
    panel.grid(visible=False)
    for row in range(1, len(shown)):  # cells of one colour are still cells
        panel.axhline(row - 0.5, color=PALE, lw=1)
    for column in range(1, len(shown[0])):
        panel.axvline(column - 0.5, color=PALE, lw=1)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            value = values[row][column]
            if text and value is not None:
                panel.text(
                    column, row, text, ha="center", va="center", fontsize=9,
                    color=shade_text(value / top),
                )  # fmt: skip
    return image
