"""Eight ways of hiding needles: facts about keys, in noise, in prose or among other needles."""

import random
import uuid
from typing import Literal

from llama_surgery.evaluation.ruler.draft import NOISE, Draft, Request, listed, scattered
from llama_surgery.evaluation.ruler.materials import distinct_keys, running_text

Haystack = Literal["noise", "prose", "needles"]
Kind = Literal["word", "number", "uuid"]

#: In prose, needles stand at this many evenly spaced depths, at most one at each.
DEPTHS = 40


def needles(
    request: Request,
    *,
    haystack: Haystack,
    key: Kind = "word",
    value: Kind = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    """One kind of needle task.

    Args:
        haystack: What surrounds the needles: a repeated line, running text, or needles about other keys.
        key: What the needles are about.
        value: What they say of it.
        keys: Keys with a needle.
        values: Needles of each key.
        queries: Keys that are asked for; all their values are the answer.
    """
    rng = request.rng
    # Drawn before the haystack, so that its size does not change what is asked.
    own_keys = _distinct(rng, key, keys)
    own_values = _distinct(rng, value, keys * values)
    facts = [
        _fact(own_keys[number // values], fact_value, value) for number, fact_value in enumerate(own_values)
    ]
    asked = sorted(rng.sample(range(keys), queries))
    references = [v for number in asked for v in own_values[number * values : (number + 1) * values]]
    rng.shuffle(facts)
    if haystack == "prose":
        context = _in_prose(request, facts)
    elif haystack == "noise":
        context = "\n".join(scattered(rng, [NOISE] * request.size, facts))
    else:
        context = "\n".join(
            scattered(rng, _others(rng, key, value, own_keys, own_values, request.size), facts)
        )
    several = len(references) > 1
    names = listed([own_keys[number] for number in asked])
    what = f"special magic {value}{'s' if several else ''} for {names}"
    verb = "are" if several else "is"
    prompt = (
        f"Some special magic {value}s are hidden in the text below. Keep them in mind, since there is a "
        f"question about them at its end.\n\n{context}\n\nQuestion: what {verb} the {what}, as the text "
        f"above has {'them' if several else 'it'}?"
    )
    return Draft(prompt, f"Answer: according to the text, the {what} {verb}", tuple(references))


def _fact(key: str, value: str, kind: Kind) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _distinct(rng: random.Random, kind: Kind, count: int) -> list[str]:
    if kind == "word":
        return distinct_keys(rng, count)
    if kind == "number":
        return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _others(
    rng: random.Random, key: Kind, value: Kind, own_keys: list[str], own_values: list[str], count: int
) -> list[str]:
    """Needles about keys and with values that are not those of the sample."""
    spare = count + len(own_keys) + len(own_values)
    other_keys = [k for k in _distinct(rng, key, spare) if k not in own_keys]
    other_values = [v for v in _distinct(rng, value, spare) if v not in own_values]
    return [_fact(k, v, value) for k, v in zip(other_keys[:count], other_values, strict=False)]


def _in_prose(request: Request, facts: list[str]) -> str:
    rng, sentences = request.rng, request.materials.sentences
    start = rng.randrange(len(sentences))
    depths = sorted(rng.sample(range(DEPTHS), len(facts)))
    text = running_text(sentences, request.size, start)
    for depth, fact in sorted(zip(depths, facts, strict=True), reverse=True):
        text.insert(round(depth / (DEPTHS - 1) * len(text)), fact)
    return " ".join(text)
