"""Figures in benchmarks/results."""

from collections.abc import Sequence

from csv_tables import RESULTS
from matplotlib.figure import Figure

from llama_surgery.files import write_atomically
from llama_surgery.report.style import to_svg


def write_figure(fig: Figure, name: str, title: str, told: Sequence[str]) -> None:
    """Writes ``name`` in benchmarks/results, and prints what it shows, which is its description too."""
    svg = to_svg(fig, f"{title}. " + "; ".join(told))
    write_atomically(RESULTS / name, lambda file: file.write_text(svg, encoding="utf-8"))
    print("\n".join(told))
