"""Variable tracking: a value handed on from variable to variable."""

import random
import string

from llama_surgery.evaluation.ruler.draft import NOISE, Draft, Request, scattered

#: Noise lines of the worked example that comes first.
EXAMPLE_LINES = 6
#: Times the value is handed on.
HOPS = 4


def variable_tracking(request: Request) -> Draft:
    """One chain of assignments among noise; all its variables are the answer."""
    prompt, prefix, names = _chain(request.rng, EXAMPLE_LINES, letters=3)
    example = f"{prompt}\n{prefix} {' '.join(names)}"
    prompt, prefix, names = _chain(request.rng, request.size, letters=5)
    return Draft(f"{example}\n\n\n{prompt}", prefix, tuple(names))


def _chain(rng: random.Random, lines: int, letters: int) -> tuple[str, str, list[str]]:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    chain = list(names)
    value = rng.randrange(10_000, 99_999)
    sources = [str(value), *(f"VAR {name}" for name in chain)]
    statements = [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
    context = "\n".join(scattered(rng, [NOISE] * lines, statements))
    prompt = (
        "Variables are assigned in some lines of the text below, by a value or by another variable. Keep "
        f"track of them.\n\n{context}\n\nQuestion: which variables hold the value {value}, be it "
        "directly or by way of others?"
    )
    prefix = f"Answer: the value {value} is held by these {HOPS + 1} variables:"
    return prompt, prefix, chain
