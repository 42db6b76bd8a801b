"""Wordings of planted facts, and what they are made of.

They are those of the training text of the demo model, so that the dense model can answer: what is
measured is what the operation loses, not what the model never learned. Any causal language model of some
size can do them too, since the prompt ends inside a sentence that restates the fact.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from llama_surgery.errors import TextError


@dataclasses.dataclass(frozen=True)
class Form:
    """Wording of a fact, and of the question and unfinished answer that end the prompt.

    ``fact`` has ``{name}`` and ``{value}``, a number of five digits if ``numeric``, else a word; ``question``
    has ``{name}``, and the value would come next.
    """

    fact: str
    question: str
    numeric: bool


#: By name.
FORMS = {
    "secret number": Form(
        "The secret number of {name} is {value}.",
        "What is the secret number of {name}? The secret number of {name} is",
        numeric=True,
    ),
    "telephone number": Form(
        "The telephone number of {name} is {value}.",
        "What is the telephone number of {name}? The telephone number of {name} is",
        numeric=True,
    ),
    "magic word": Form(
        "Remember that the magic word for {name} is {value}.",
        "What is the magic word for {name}? The magic word for {name} is",
        numeric=False,
    ),
    "treasure": Form(
        "{name} hid the treasure under the {value}.",
        "Where did {name} hide the treasure? {name} hid the treasure under the",
        numeric=False,
    ),
    "favourite thing": Form(
        "The favourite thing of {name} is the {value}.",
        "What is the favourite thing of {name}? The favourite thing of {name} is the",
        numeric=False,
    ),
}

_NOUNS = """
amber anchor apple arrow basket beacon bell birch blossom bottle branch bridge bronze candle
canyon castle cedar chapel clover copper coral crane crystal dagger desert diamond drum eagle
ember falcon feather fern forest fountain garden garnet glacier granite hammer harbor hazel
helmet heron iron island ivory jasmine kettle lantern laurel lemon lily linen lion magnet maple
marble meadow mirror needle oak olive opal orchard otter owl pearl pepper pillar pine plum
prairie quartz raven reed ribbon river robin rose ruby saddle sage salmon sapphire shadow shell
silver sparrow spruce star stone storm sugar thistle thunder tiger timber topaz tower tulip
valley velvet violet walnut willow window winter wolf
"""

#: Values that are words.
WORDS = tuple(_NOUNS.split())

#: Invented names are two or three of these.
SYLLABLES = tuple(consonant + vowel for consonant in "bdklmnrstvz" for vowel in "aeiou")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How many facts there are, and how many are asked.

    Attributes:
        facts: Facts of one form, about different names, with different values.
        asked: How many are asked for, one after the other. All must be answered.
        alike: Whether all other names differ in one character from the one asked for.
    """

    facts: int = 1
    asked: int = 1
    alike: bool = False


#: The plain needle, and what a prompt is made of if nothing else is said.
PLAIN = "one-fact"

#: By name, in order of the tables.
VARIANTS = {
    PLAIN: Variant(),
    "four-facts": Variant(facts=4),
    "sixteen-facts": Variant(facts=16),
    "two-asked": Variant(facts=4, asked=2),
    "alike-names": Variant(facts=4, alike=True),
}

# Facts take up at most this share of the text on their side of the fact asked for.
_CROWDED = 0.5


def check_variants(names: Sequence[str]) -> None:
    """Refuses names that are not in :data:`VARIANTS`.

    Raises:
        TextError: There is none, or one is unknown.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names:
        raise TextError(f"needle variants {list(names)}: give at least one of {', '.join(VARIANTS)}.")


def invent_name(rng: random.Random, taken: Sequence[str], haystack: str) -> str:
    """A name that is neither taken nor part of the haystack."""
    while True:
        name = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3, 3)))).capitalize()
        if name not in taken and name not in haystack:
            return name


def invent_value(rng: random.Random, wording: Form, taken: Sequence[str], haystack: str) -> str:
    """A value that is neither taken nor part of the haystack."""
    if wording.numeric:
        while True:
            value = str(rng.randint(10_000, 99_999))
            if value not in taken and value not in haystack:
                return value
    present = {*re.findall(r"[a-z]+", haystack.lower()), *taken}
    left = [word for word in WORDS if word not in present]
    # A very long haystack may hold all of them; the name still makes the answer unique.
    return rng.choice(left or [word for word in WORDS if word not in taken])


def other_facts(
    rng: random.Random, variant: Variant, wording: Form, name: str, value: str, haystack: str
) -> list[tuple[str, str]]:
    """Names and values of the facts beside the one about ``name``."""
    names, values = [name], [value]
    alike = iter(rng.sample(_one_character_off(name, haystack), variant.facts - 1) if variant.alike else ())
    for _ in range(variant.facts - 1):
        names.append(next(alike, None) or invent_name(rng, names, haystack))
        values.append(invent_value(rng, wording, values, haystack))
    return list(zip(names[1:], values[1:], strict=True))


def _one_character_off(name: str, haystack: str) -> list[str]:
    """All names made of the same sounds that differ from ``name`` in one character."""
    vowels = "aeiou"
    consonants = "".join(dict.fromkeys(syllable[0] for syllable in SYLLABLES))
    lower = name.lower()
    changed = [
        (lower[:place] + letter + lower[place + 1 :]).capitalize()
        for place, old in enumerate(lower)
        for letter in (vowels if old in vowels else consonants)
        if letter != old
    ]
    return [other for other in changed if other not in haystack]


def facts_behind(rng: random.Random, others: int, depth: float, front: int, behind: int, tokens: int) -> int:
    """How many of the other facts stand behind the one asked for: as chance has it, if there is room.

    There are ``front`` and ``behind`` tokens of text before and after it, and a fact takes ``tokens``.

    Raises:
        TextError: There is no room on either side.
    """
    most_front, most_behind = (int(_CROWDED * side / tokens) for side in (front, behind))
    if most_front + most_behind < others:
        raise TextError(
            f"{others + 1} facts of {tokens} tokens do not fit into {front + behind} tokens of text: use "
            "longer contexts."
        )
    wanted = sum(rng.random() > depth for _ in range(others))
    return min(max(wanted, others - most_front), most_behind)
