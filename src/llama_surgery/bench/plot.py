"""Plots of what was measured, as SVG files beside the CSV."""

from pathlib import Path
from typing import Any

from llama_surgery.files import write_atomically
from llama_surgery.report.style import BLUE, GREY, figure, to_svg


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
