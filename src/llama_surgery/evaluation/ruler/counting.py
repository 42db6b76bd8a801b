"""Counting: the most frequent words of a long list."""

import math
import random
import string

from llama_surgery.evaluation.ruler.draft import Draft, Request
from llama_surgery.evaluation.ruler.materials import distinct_words

#: Below this length common words have fewer entries, since more would not fit.
SHORT = 4096
COMMON = 10
ZETA_2 = math.pi**2 / 6


def common_words(request: Request) -> Draft:
    """Ten words occur often in a numbered list, all others seldom. ``size`` counts words."""
    rng, short = request.rng, request.length < SHORT
    words, common = _words(rng, request.size)
    example_words, example_common = _words(rng, 20 if short else 40)
    prompt, prefix = _common_prompt(rng, example_words, example_common, *((3, 1) if short else (10, 3)))
    example = f"{prompt}\n{prefix} {_numbered(example_common)}"
    prompt, prefix = _common_prompt(rng, words, common, *((6, 1) if short else (30, 3)))
    return Draft(f"{example}\n\n\n{prompt}", prefix, tuple(common))


def _words(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """Different words, and the first ten of them that are no part of another."""
    words = distinct_words(rng, max(count, 2 * COMMON))
    joined = "\n".join(words)
    common = [word for word in words if joined.count(word) == 1][:COMMON]
    rare = [word for word in words if word not in set(common)]
    return common + rare[: max(0, count - COMMON)], common


def _common_prompt(
    rng: random.Random, words: list[str], common: list[str], often: int, seldom: int
) -> tuple[str, str]:
    entries = [word for word in words for _ in range(often if word in set(common) else seldom)]
    rng.shuffle(entries)
    prompt = (
        "Below is a numbered list of words. Some of them occur much more often than the others. Keep those "
        f"in mind.\n\n{_numbered(entries)}\n\nQuestion: which {COMMON} words are the most frequent ones of "
        "the list?"
    )
    return prompt, f"Answer: the {COMMON} most frequent words of the list are:"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(request: Request) -> Draft:
    """Invented words with Zipf frequencies; the answer is the three most frequent ones.

    ``size`` counts the entries. The word of rank k occurs size / (k² · ζ(2)) times; rank 1 is a row of
    dots, to be ignored.
    """
    rng = request.rng
    vocabulary = max(4, (request.length - 50) // 50)
    words: dict[str, None] = {}
    while len(words) < vocabulary:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(words)[1:]]
    entries = [
        word
        for rank, word in enumerate(ranked, start=1)
        for _ in range(int(request.size / (rank**2 * ZETA_2)))
    ]
    rng.shuffle(entries)
    prompt = (
        "Below is a text in a code. Count its words and leave the rows of dots aside.\n\n"
        f"{' '.join(entries)}\n\nQuestion: which three code words are the most frequent ones of the text?"
    )
    prefix = "Answer: the three most frequent code words are:"
    return Draft(prompt, prefix, tuple(ranked[1:4]))
