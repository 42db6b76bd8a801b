"""Plots of kernels' times, as SVG files beside the CSV."""

from pathlib import Path
from typing import Any

from llama_surgery.files import write_atomically
from llama_surgery.report.style import BLUE, GREY, figure, to_svg

#: Colour and line style of what is drawn over lengths.
LINES = {
    "attention with layout and selection": (BLUE, "o-"),
    "decode": (BLUE, "o-"),
    "cuDNN": (GREY, "s-"),
    "cuDNN, heads as rows": (GREY, "s-"),
    "FlashAttention-2": (GREY, "^--"),
    "FlashAttention-2, heads as rows": (GREY, "^--"),
    "FlexAttention": (GREY, "x:"),
}


def plot_prefill(rows: list[dict[str, Any]], path: Path) -> None:
    """Lines: attention of a prompt against its length, every way of computing it."""
    _plot_lengths(rows, path, "Attention of a prompt, one layer")


def plot_decode(rows: list[dict[str, Any]], path: Path) -> None:
    """Lines: attention of one decode step, batch 1, pages of 64 keys scored as wholes."""
    chosen = [row for row in rows if row["batch"] == 1 and row["page"] == row["balls"] == 64]
    _plot_lengths(chosen, path, "Attention of a decode step, one layer, batch 1")


def _plot_lengths(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """One line for each part that was timed at every length, the operated path in colour."""
    lengths = sorted({row["n"] for row in rows})
    by_part: dict[str, dict[int, float]] = {}
    for row in rows:
        by_part.setdefault(row["part"], {}).setdefault(row["n"], row["p50_ms"])
    lines = {part: found for part, found in by_part.items() if part in LINES}
    if not lines:
        return
    with figure(5.2, 3.4) as fig:
        axes = fig.add_subplot(1, 1, 1)
        for part, found in lines.items():
            colour, style = LINES[part]
            axes.plot(list(found), list(found.values()), style, color=colour, label=part)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds")
        axes.set_title(title)
        axes.legend(frameon=False)
        svg = to_svg(fig, title)
    write_atomically(path, lambda file: file.write_text(svg + "\n", encoding="utf-8"))
