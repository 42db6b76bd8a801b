"""One head's tree over a short text: which tokens a KV head's keys put into one page."""

import dataclasses
from typing import Any

from llama_surgery.errors import SurgeryError


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
        pages = [0] * len(self.order)
        for page, offsets in enumerate(self.pages()):
            for offset in offsets:
                pages[offset] = page
        return pages

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
