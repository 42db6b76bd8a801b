"""What models lose against what they read: a table, and a figure, of real_quality.csv.

python benchmarks/loss_by_density.py      # benchmarks/results/loss-by-density.svg
"""

import collections
import sys

from csv_tables import Row, markdown, percent, ratio_told, tokens
from figures import write_figure
from quality_tables import REAL, age, all_rows, cell_of

from llama_surgery.report.style import BLUE, GREY, PERCENT, PURPLE, VERMILION, figure

#: Forms that are shown, each with its colour and mark.
FORMS = {
    "operated": (VERMILION, "o"),
    "operated, learned": (BLUE, "o"),
    REAL["tokens"]: (GREY, "^"),
    REAL["blocks"]: (PURPLE, "v"),
}
#: Of how many densities a form has to be there for a model to be shown.
FEWEST = 3
#: Total densities that are closer than this are the same point, of which the newest row counts.
APART = 0.008


def points() -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """By model, length and text: every form's rows, in order of total density."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = collections.defaultdict(dict)
    for form, row in sorted(all_rows(), key=lambda pair: age(pair[1]), reverse=True):
        if form in FORMS and row["ratio"] and (form != "operated" or "budgets" in row["settings"]):
            rows = found[cell_of(row)].setdefault(form, [])
            density = float(row["total_density"])
            if all(abs(density - float(other["total_density"])) > APART for other in rows):
                rows.append(row)
    for forms in found.values():
        for rows in forms.values():
            rows.sort(key=lambda row: float(row["total_density"]))
    several = {cell: forms for cell, forms in found.items() if max(map(len, forms.values())) >= FEWEST}
    return dict(sorted(several.items()))


def table() -> str:
    """All points, as Markdown."""
    cells = [
        [
            model, tokens(length), text, form, percent(row["far_density"]), percent(row["total_density"]),
            ratio_told(row), row["windows"],
        ]
        for (model, length, text), forms in points().items()
        for form in FORMS
        for row in forms.get(form, ())
    ]  # fmt: skip
    names = (
        "model", "tokens", "text", "form", "far density", "total density",
        "perplexity ÷ dense (95% interval)", "windows",
    )  # fmt: skip
    return markdown(names, cells)


def main() -> int:
    shown, told = points(), []
    with figure(9.6, 3.4) as fig:
        panels = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, ((model, length, text), forms) in zip(panels, shown.items(), strict=True):
            for form, (colour, marker) in FORMS.items():
                rows = forms.get(form, [])
                low, ratio, high = (
                    [float(row[name]) - 1 for row in rows] for name in ("ratio_low", "ratio", "ratio_high")
                )
                panel.errorbar(
                    [float(row["total_density"]) for row in rows], ratio,
                    [[a - b for a, b in zip(ratio, low, strict=True)],
                     [a - b for a, b in zip(high, ratio, strict=True)]],
                    color=colour, marker=marker, markersize=4.5, capsize=2, linewidth=1.2, label=form,
                )  # fmt: skip
                told += [f"{model}, {length} tokens, {form}: {ratio_told(row)}" for row in rows]
            panel.set_xlabel("pairs read of all")
            panel.set_title(f"{model}\n{tokens(length)} tokens, {text}", fontsize=9.5)
            panel.set_yscale("symlog", linthresh=0.01)
            panel.xaxis.set_major_formatter(PERCENT)
            panel.axhline(0, color=GREY, linewidth=0.8)
        panels[0].set_ylabel("perplexity lost")
        panels[0].set_yticks([-0.01, 0, 0.005, 0.01, 0.02, 0.05, 0.1])
        panels[0].minorticks_off()
        panels[0].yaxis.set_major_formatter(PERCENT)
        panels[-1].legend(loc="lower right", fontsize=8)
        write_figure(fig, "loss-by-density.svg", "Perplexity lost against the density of attention", told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
