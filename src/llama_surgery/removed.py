"""Options of older releases that are gone, and what to tell whoever stored them."""

from typing import Any

from llama_surgery.errors import SurgeryError

_AGAIN = "Operate and calibrate the model again."

#: Fields of older releases: the default, at which a stored configuration means the same without them, and
#: what to tell whoever stored anything else.
REMOVED: dict[str, tuple[Any, str]] = {
    "arity": (
        2,
        "it split every node of the tree into more than two and was removed because a pre-trained model lost "
        f"more quality that way at the same density. {_AGAIN}",
    ),
    "directions": (
        "principal",
        "it ordered a chunk's keys by position, or in a subspace of few directions, and was removed because "
        f"a pre-trained model lost more quality that way at the same density. {_AGAIN}",
    ),
    "pages_per_row": (
        None,
        "it opened a fixed count of pages for every token, and was removed because real models lost more "
        f"than it saved: a threshold reads what a token needs. {_AGAIN}",
    ),
    "score_stride": (
        1,
        "it scored only some tokens of a tile, and was removed because real models lost more than it saved. "
        f"{_AGAIN}",
    ),
    "coarse_to_fine": (
        False,
        "it looked for pages under balls of several pages, and was removed because real models lost more "
        f"than it saved. {_AGAIN}",
    ),
    "coarse_totals": (
        False,
        "it added up a token's far field from balls of several pages, and was removed because real models "
        f"lost more than it saved. {_AGAIN}",
    ),
    "variance_pool": (
        1,
        "it averaged variances of several channels for page scores, and was removed because real models lost "
        "more than it saved: Qwen2.5-Coder-0.5B's perplexity was 1.29 times dense's with it and 1.06 times "
        f"without it. {_AGAIN}",
    ),
    "alpha": (
        1.0,
        "it weighed the variance term of the page score, which has a bound instead: the term was too large "
        f"for some balls of sharp heads, not for all. {_AGAIN} Weights for every head can be learned.",
    ),
}

#: Choices of older releases for fields that are still there, and what to tell whoever makes them.
REMOVED_CHOICES: dict[tuple[str, str], str] = {
    ("backend", "flex"): (
        "FlexAttention as an executor was removed because the kernels are faster wherever it is fast. Use "
        "'auto', which executes the same."
    ),
    ("topology", "dense"): (
        "dense_until says which positions see everything. For dense attention everywhere, set dense_until to "
        "the length of the longest text or more."
    ),
    ("summary", "chunk"): (
        "one key for all that is unseen of a chunk was removed because a pre-trained model lost more quality "
        "with it than with no summary at all. Use 'page' or 'none'."
    ),
    ("summary", "ball"): (
        "one key for every ball of an unseen page was removed because it costs four times as much as one for "
        f"the page, and a pre-trained model hardly gained by it. Use 'page'. {_AGAIN}"
    ),
}

#: What releases executed that did not have these fields yet.
BEFORE = {"summary": "none"}


#: Fields of older releases whose every value still works: what they chose is fixed now. Pages were scored by
#: balls of ``moment_size`` keys; θ stands for another density than it did, whatever that was.
_FIXED = ("moment_size",)


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """What an older release stored, without the fields that are gone.

    Raises:
        SurgeryError: One of them has another value than its default.
    """
    for name, (default, why) in REMOVED.items():
        if values.get(name, default) != default:
            raise SurgeryError(f"{name}={values[name]!r} is no longer supported: {why}")
    return {name: value for name, value in values.items() if name not in (*REMOVED, *_FIXED)}
