"""What all figures share: sizes, fonts, colours, and how a figure becomes inline SVG."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

#: Okabe and Ito's palette: told apart with every common form of colour blindness.
INK, GREY, PALE = "#1a1f26", "#6b7480", "#d9dee5"
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
)
#: The dense model is always grey; operated ones take these colours in order.
OPERATED = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)

#: White to deep blue: order and amount survive greyscale.
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f7fbff", "#9ecae1", "#2171b5", "#08306b"])

#: Labels of shares.
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, small and selectable
    "svg.hashsalt": "llama-surgery",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of ``width`` × ``height`` inches in the report's style, without global state."""
    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(fig: Figure, description: str) -> str:
    """What was drawn inside :func:`figure` as an ``<svg>`` element that scales to its container.

    ``description`` is for readers who do not see it.
    """
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Type": None, "Format": None}
    with matplotlib.rc_context(_SETTINGS):
        fig.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def shade_text(share: float) -> str:
    """Colour in which text is readable on :data:`AMOUNT` at ``share`` of its range."""
    return "white" if share > 0.55 else INK
