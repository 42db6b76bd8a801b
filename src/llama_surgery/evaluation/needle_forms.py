"""Wordings of planted facts, and what they are made of.

They are those of the training text of the demo model, so that the dense model can answer: what is
measured is what the operation loses, not what the model never learned. Any causal language model of some
size can do them too, since the prompt ends inside a sentence that restates the fact.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """Wording of a fact, and of the question and unfinished answer that end the prompt.

    Attributes:
        fact: With ``{name}`` and ``{value}``.
        question: With ``{name}``; the value would come next.
        numeric: Whether the value is a number of five digits or a word.
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
