"""A head's tree as the template draws it: coloured text, nested balls, pages of readable runs."""

import itertools
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from llama_surgery.report.figures import page_name
from llama_surgery.report.tree import HeadTree

#: Perceptually even and safe for colour-blind readers; its dark end is left out and the rest lightened,
#: so that text stays readable on it.
_COLOURS = colormaps["viridis"]
_DARKEST, _LIGHTEN = 0.18, 0.42


def forest_view(tree: HeadTree) -> dict[str, Any]:
    """Everything the template says about a tree.

    Returns:
        Plain values: ``text`` (runs of tokens of one page, in reading order), ``root`` (nested balls down
        to pages with their runs), ``pages`` (the pages' offsets) and the tree's own numbers.
    """
    colours = page_colours(tree)
    page_of = tree.page_of()
    runs = [list(run) for _, run in itertools.groupby(range(len(page_of)), key=page_of.__getitem__)]
    text = [
        {
            "page": page_name(page_of[run[0]]),
            "colour": colours[page_of[run[0]]][1],
            "text": "".join(tree.tokens[i] for i in run),
        }
        for run in runs
    ]
    leaves = [_leaf(tree, page, offsets, colours[page]) for page, offsets in enumerate(tree.pages())]
    return {
        "layer": tree.layer,
        "kv_head": tree.kv_head,
        "tokens": len(tree.tokens),
        "depth": (len(leaves) - 1).bit_length(),
        "page_size": tree.page_size,
        "pages": leaves,
        "text": text,
        "root": _nest(leaves),
    }


def page_colours(tree: HeadTree) -> list[tuple[str, str]]:
    """A strong and a light colour of every page, in tree order.

    Neighbours differ by as much as their tree distance says: pages of one small ball look alike, and
    the colour jumps where the tree's first split lies.
    """
    pages = len(tree.order) // tree.page_size
    places = [0.0]
    for page in range(1, pages):
        apart, a, b = 0, page - 1, page
        while a != b:
            a, b, apart = a // 2, b // 2, apart + 1
        places.append(places[-1] + apart)
    span = places[-1] or 1.0
    strong = [_COLOURS(_DARKEST + (1 - _DARKEST) * place / span)[:3] for place in places]
    return [(to_hex(colour), _lightened(*colour)) for colour in strong]


def _lightened(red: float, green: float, blue: float) -> str:
    return to_hex((1 - _LIGHTEN * (1 - red), 1 - _LIGHTEN * (1 - green), 1 - _LIGHTEN * (1 - blue)))


def _leaf(tree: HeadTree, page: int, offsets: list[int], colour: tuple[str, str]) -> dict[str, Any]:
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and runs[-1][-1] == offset - 1:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return {
        "name": page_name(page),
        "strong": colour[0],
        "light": colour[1],
        "runs": [
            {"text": _visible("".join(tree.tokens[i] for i in r)), "first": r[0], "last": r[-1]} for r in runs
        ],
    }


def _visible(text: str) -> str:
    """Line ends as a sign, and blanks around it trimmed: a page is a list of snippets."""
    return text.replace("\n", "¶").strip() or "␣"


def _nest(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Pair neighbours until one root is left."""
    while len(nodes) > 1:
        nodes = [{"children": nodes[i : i + 2]} for i in range(0, len(nodes), 2)]
    return nodes[0]
