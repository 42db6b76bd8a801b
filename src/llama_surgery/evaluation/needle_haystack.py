"""Haystacks: runs of one document, cut at sentences, with room for facts between paragraphs."""

import bisect
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError

# A haystack is made of pieces of at most this many characters, so that it ends within a sentence or two
# of where it should.
_PIECE = 200

#: Pieces tokenised alone may count more tokens than the whole text does, and names differ in length: a
#: haystack has this share and this number of tokens too many, which are cut off at the front.
SPARE_SHARE, SPARE = 0.05, 32


class Document:
    """A document in pieces: sentences, several where they are short, parts where they are long.

    Attributes:
        pieces: Joined, they are the document.
        ends: Tokens before each piece, and of all.
        paragraphs: Indices of the pieces that begin a paragraph.
        largest: Tokens of the largest piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        paragraphs = [list(cut_pieces(paragraph)) for paragraph in re.split(r"(?<!\n)(?=\n\n)", text)]
        self.pieces = list(itertools.chain.from_iterable(paragraphs))
        self.paragraphs = [0, *itertools.accumulate(map(len, paragraphs[:-1]))]
        encoded = tokenizer(self.pieces, add_special_tokens=False, verbose=False).input_ids
        self.ends = [0, *itertools.accumulate(map(len, encoded))]
        self.largest = max(map(len, encoded), default=0)

    def places(self, front: int, behind: int) -> list[int]:
        """Pieces with at least so many tokens before and from them on: paragraphs, if there are any."""
        for indices in (self.paragraphs, range(len(self.pieces) + 1)):
            low = bisect.bisect_left(indices, front, key=self.ends.__getitem__)
            high = bisect.bisect_right(indices, self.ends[-1] - behind, key=self.ends.__getitem__)
            if low < high:
                return list(indices[low:high])
        return []


def cut_pieces(paragraph: str) -> Iterator[str]:
    """Cuts a text before white space, which most tokenizers join to what comes after it."""
    rest = paragraph
    while len(rest) > _PIECE:
        # After the last sentence that fits, else after the last word, else anywhere.
        head = rest[:_PIECE]
        sentences = [match.end() for match in re.finditer(r"[.!?;][\"'”’)]*(?=\s)", head)]
        words = [match.end() for match in re.finditer(r"\S(?=\s)", head)]
        cut = (sentences or words or [_PIECE])[-1]
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Pieces ``start`` … ``stop`` of one document, split where the fact goes, before piece ``split``.

    ``front`` tokens are wanted before the split; what there is more is cut off at the start.
    """

    document: Document
    start: int
    split: int
    stop: int
    front: int

    @property
    def text(self) -> str:
        """All of it, as it stands in the document."""
        return "".join(self.document.pieces[self.start : self.stop])

    def parts(
        self, fact: str, before: Sequence[str], behind: Sequence[str], rng: random.Random
    ) -> tuple[list[str], int]:
        """Paragraphs with facts between them, none blank, and the index of the first fact among them.

        ``fact`` stands at the split, the others at paragraphs where there are enough, safe from the cut.
        """
        ends = self.document.ends
        safe = bisect.bisect_left(ends, ends[self.split] - self.front + 2 * SPARE)
        placed = [
            *self._placed(before, min(safe, self.split), self.split, rng),
            (self.split, fact),
            *self._placed(behind, self.split, self.stop, rng),
        ]
        stops = [place for place, _ in placed]
        passages = [
            "".join(self.document.pieces[low:high]).strip()
            for low, high in itertools.pairwise([self.start, *stops, self.stop])
        ]
        written = [fact for _, fact in placed]
        parts = [part for pair in itertools.zip_longest(passages, written) for part in pair if part]
        return parts, int(bool(passages[0]))

    def _placed(self, facts: Sequence[str], low: int, high: int, rng: random.Random) -> list[tuple[int, str]]:
        """Facts with pieces low … high that they go before, in order."""
        if not facts:
            return []
        inner = [piece for piece in self.document.paragraphs if low < piece < high]
        if len(inner) < len(facts):
            inner = list(range(low, high + 1))
        places = (
            rng.sample(inner, len(facts)) if len(inner) >= len(facts) else rng.choices(inner, k=len(facts))
        )
        return list(zip(sorted(places), facts, strict=True))


def choose_haystack(documents: Sequence[Document], front: int, behind: int, rng: random.Random) -> Haystack:
    """A run of a document with somewhat more than ``front`` tokens before its split, and ``behind`` after it.

    Raises:
        TextError: No document is long enough.
    """
    wanted, front = front, front + SPARE + round((front + behind) * SPARE_SHARE)
    places = [(document, document.places(front + document.largest, behind)) for document in documents]
    places = [(document, indices) for document, indices in places if indices]
    if not places:
        longest = max((document.ends[-1] for document in documents), default=0)
        raise TextError(
            f"a haystack of {front + behind} tokens is needed in one document, but the longest of "
            f"{len(documents)} has {longest}. Give a longer text or ask for shorter contexts."
        )
    document, indices = rng.choice(places)
    split, ends = rng.choice(indices), document.ends
    stop = bisect.bisect_right(ends, ends[split] + behind) - 1
    # What the last whole piece leaves of ``behind`` is made up for in front.
    start = bisect.bisect_right(ends, ends[stop] - behind - front) - 1
    return Haystack(document, start, split, stop, wanted)
