"""What a task's generator is given, and what it makes."""

import dataclasses
import random
from collections.abc import Callable

from llama_surgery.evaluation.ruler.materials import Materials


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample asked for.

    Attributes:
        rng: The sample's own, freshly seeded.
        size: How much haystack: words, lines, list entries or documents, as the task counts.
        index: Number of the sample.
        length: Tokens that prompt and answer may take together.
        seed: Of the whole run.
        materials: Text, words and questions.
    """

    rng: random.Random
    size: int
    index: int
    length: int
    seed: int
    materials: Materials


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample before it is fitted to a length.

    Attributes:
        prompt: Instruction, context and question.
        prefix: How the answer begins; the model goes on from it.
        references: What the answer must contain.
    """

    prompt: str
    prefix: str
    references: tuple[str, ...]


#: Makes a sample of the size asked for.
Builder = Callable[[Request], Draft]

#: Lines of a haystack without content.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def listed(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def scattered(rng: random.Random, lines: list[str], inserts: list[str]) -> list[str]:
    """``lines`` with each of ``inserts`` at a random place of its own, in the order given."""
    total = len(lines) + len(inserts)
    places = set(rng.sample(range(total), len(inserts)))
    rest, due = iter(lines), iter(inserts)
    return [next(due if place in places else rest) for place in range(total)]
