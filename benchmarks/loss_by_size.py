"""Draws what models of several sizes lose at about the same density, from real_quality.csv.

python benchmarks/loss_by_size.py      # benchmarks/results/loss-by-size.svg
"""

import sys

from figures import write_figure
from quality_tables import real_rows

from llama_surgery.report.style import BLUE, PERCENT, VERMILION, figure

#: Parameters of the models, embeddings included, in thousands of millions.
SIZES = {"smollm2-135m": 0.135, "qwen2.5-coder-0.5b": 0.494, "qwen2.5-coder-1.5b": 1.544}
LENGTH = "8192"
FORMS = {"operated": (VERMILION, "nothing learned"), "operated, learned": (BLUE, "learned corrections")}
#: Marks of texts, and how far beside its model each stands, so that none hides another.
TEXTS = {"python-code": ("o", 1.03), "books-val": ("s", 0.97)}


def main() -> int:
    with figure(6.4, 3.4) as fig:
        panel = fig.subplots()
        told = []
        for form, row in real_rows():
            model = row["model"].removesuffix(".gguf")
            if row["length"] != LENGTH or form not in FORMS or model not in SIZES:
                continue
            (colour, name), (marker, beside) = FORMS[form], TEXTS[row["text"]]
            ratio, low, high = (float(row[column]) - 1 for column in ("ratio", "ratio_low", "ratio_high"))
            panel.errorbar(
                SIZES[model] * beside, ratio, [[ratio - low], [high - ratio]],
                color=colour, marker=marker, linestyle="none", capsize=2,
                label=f"{row['text']}, {name}",
            )  # fmt: skip
            told.append(f"{model} on {row['text']}, {name}: {100 * ratio:.2f}%")
        panel.set(xscale="log", yscale="log", xlabel="parameters", ylabel="perplexity lost")
        panel.set_xticks(list(SIZES.values()), [f"{1000 * size:.0f}M" for size in SIZES.values()])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(PERCENT)
        panel.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1])
        labels = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        panel.legend(labels.values(), labels.keys(), loc="upper right", fontsize=8.5)
        write_figure(fig, "loss-by-size.svg", "Perplexity lost against the size of the model", told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
