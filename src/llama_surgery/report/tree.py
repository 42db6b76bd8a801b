"""One head's tree over a short text: which tokens a KV head's keys put into one page, and how it is drawn."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from llama_surgery.errors import SurgeryError

#: Perceptually even and safe for colour-blind readers; its dark end is left out and the rest lightened,
#: so that text stays readable on it.
_COLOURS = colormaps["viridis"]
_DARKEST, _LIGHTEN = 0.18, 0.42


@dataclasses.dataclass(frozen=True)
class HeadTree:
    """The tree of one KV head over the first chunk of a text.

    Attributes:
        layer: Layer index.
        kv_head: KV head of that layer.
        tokens: The chunk's tokens as text, in reading order.
        order: Tree order: slot s holds the token of offset ``order[s]``.
        page_size: Tokens of a page.
    """

    layer: int
    kv_head: int
    tokens: list[str]
    order: list[int]
    page_size: int

    def pages(self) -> list[list[int]]:
        """Offsets of each page's tokens, ascending; pages in tree order."""
        size = self.page_size
        return [sorted(self.order[i : i + size]) for i in range(0, len(self.order), size)]

    def page_of(self) -> list[int]:
        """The page of every token, by offset."""
        pages = {offset: page for page, offsets in enumerate(self.pages()) for offset in offsets}
        return [pages[offset] for offset in range(len(self.order))]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HeadTree":
        """Inverse of :meth:`to_dict`.

        Raises:
            SurgeryError: Fields are missing or unknown, or the order is not one of the tokens.
        """
        try:
            tree = cls(**values)
        except TypeError as error:
            raise SurgeryError(f"not a head's tree: {error}.") from error
        if sorted(tree.order) != list(range(len(tree.tokens))):
            raise SurgeryError(
                f"not a head's tree: the order of {len(tree.order)} slots is not a permutation of "
                f"{len(tree.tokens)} tokens."
            )
        return tree


def forest_view(tree: HeadTree) -> dict[str, Any]:
    """Everything the template says about a tree.

    Returns:
        Plain values: ``text`` (runs of tokens of one page, in reading order), ``root`` (nested balls down
        to pages with their runs), ``pages`` (those alone) and the tree's own numbers.
    """
    colours, page_of = page_colours(tree), tree.page_of()
    pages = [_page(tree, page, offsets, *colours[page]) for page, offsets in enumerate(tree.pages())]
    runs = [(page, list(run)) for page, run in itertools.groupby(range(len(page_of)), page_of.__getitem__)]
    nodes: list[dict[str, Any]] = pages
    while len(nodes) > 1:  # neighbours are paired until one root is left
        nodes = [{"children": nodes[i : i + 2]} for i in range(0, len(nodes), 2)]
    return {
        "layer": tree.layer,
        "kv_head": tree.kv_head,
        "tokens": len(tree.tokens),
        "depth": (len(pages) - 1).bit_length(),
        "page_size": tree.page_size,
        "pages": pages,
        "text": [
            {"page": page_name(page), "colour": colours[page][1], "text": _text(tree, run)}
            for page, run in runs
        ],
        "root": nodes[0],
    }


def page_colours(tree: HeadTree) -> list[tuple[str, str]]:
    """A strong and a light colour of every page, in tree order.

    Neighbours differ by as much as their tree distance says: pages of one small ball look alike, and
    the colour jumps where the tree's first split lies.
    """
    pages = len(tree.order) // tree.page_size
    places = np.cumsum([0, *((page ^ (page - 1)).bit_length() for page in range(1, pages))])
    strong = _COLOURS(_DARKEST + (1 - _DARKEST) * places / max(1, places[-1]))[:, :3]
    light = 1 - _LIGHTEN * (1 - strong)
    return [(to_hex(one), to_hex(other)) for one, other in zip(strong, light, strict=True)]


def page_name(page: int) -> str:
    """A … Z, AA, AB …: what the report calls the pages of a chunk."""
    letters = ""
    page += 1
    while page:
        page, digit = divmod(page - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def _page(tree: HeadTree, page: int, offsets: list[int], strong: str, light: str) -> dict[str, Any]:
    """A page and its runs of neighbouring tokens, with line ends as a sign and without blanks around them."""
    runs = [
        [offset for _, offset in run]
        for _, run in itertools.groupby(enumerate(offsets), lambda pair: pair[1] - pair[0])
    ]
    shown = [
        {"text": _text(tree, run).replace("\n", "¶").strip() or "␣", "first": run[0], "last": run[-1]}
        for run in runs
    ]
    return {"name": page_name(page), "strong": strong, "light": light, "runs": shown}


def _text(tree: HeadTree, offsets: list[int]) -> str:
    return "".join(tree.tokens[offset] for offset in offsets)
