"""Plots of what was measured, as SVG files beside the CSV."""

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


def plot_end_to_end(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: time to first token and decode step, dense beside operated, for each length."""
    parts = [part for part in ("prefill", "decode") if any(row["part"] == part for row in rows)]
    if not parts:
        return
    with figure(3.6 * len(parts), 3.2) as fig:
        for place, part in enumerate(parts, start=1):
            axes = fig.add_subplot(1, len(parts), place)
            chosen = [row for row in rows if row["part"] == part]
            names = [f"{row['length']:,}\n{row['side']}" for row in chosen]
            colours = [GREY if row["side"] == "dense" else BLUE for row in chosen]
            bars = axes.bar(names, [row["p50_ms"] for row in chosen], color=colours, width=0.7)
            labels = [f"{row['speedup']:.2f} ×" if row.get("speedup") else "" for row in chosen]
            axes.bar_label(bars, labels, padding=2)
            batch = chosen[0]["batch"]
            axes.set_title("Time to first token" if part == "prefill" else f"Decode step, batch {batch}")
            axes.set_ylabel("milliseconds")
        svg = to_svg(fig, "Times of the dense and of the operated model")
    write_atomically(path, lambda file: file.write_text(svg + "\n", encoding="utf-8"))


def plot_prefill(rows: list[dict[str, Any]], path: Path) -> None:
    """Lines: attention of a prompt against its length, every way of computing it."""
    _plot_lengths(rows, path, "Attention of a prompt, one layer")


def plot_decode(rows: list[dict[str, Any]], path: Path) -> None:
    """Lines: attention of one decode step, batch 1, pages of 64 keys."""
    chosen = [row for row in rows if row["batch"] == 1 and row["page"] == 64]
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
