"""Options that describe a topology, shared by the commands that make one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llama_surgery.cli import options
from llama_surgery.cli.options import split_values
from llama_surgery.config import SurgeryConfig

#: Steps of learning, unless told otherwise: what docs/learning.md was measured with.
STEPS = 200
_DEFAULT = SurgeryConfig()


#: Field of the configuration → type and help of its option.
_FIELDS: dict[str, Any] = {
    "page_size": options.of_topology(int, "Keys of a page, the block that is read as a whole."),
    "chunk_size": options.of_topology(int, "Tokens of a chunk: each gets a tree of its own."),
    "window": options.of_topology(int, "Tokens that always stay in the near field, which is read in full."),
    "theta": options.of_topology(
        float | None,
        "Open a page when its expected share of a head's attention exceeds this. Set by --density.",
    ),
    "theta_decode": options.of_topology(
        float | None, "The same for decoding, token by token: 0 reads everything. Set by --decode-density."
    ),
    "summary": options.of_topology(
        str, "What stands in for the pages that are not read: page, a mean of each, or none."
    ),
    "backend": options.of_topology(str, "Who executes the plan: auto, reference, gather, triton."),
}

#: The same for ``topology="gumbel"``, of commands that take it.
_GUMBEL_FIELDS: dict[str, Any] = {
    "topology": options.of_topology(
        str, "pages, or gumbel: the preprint's content router, with the options --gumbel-…"
    ),
    "gumbel_arities": options.of_topology(
        list[int] | None,
        "Children of a node of its tree, 2 if left out. Repeated, one for each of equal groups of heads.",
    ),
    "gumbel_radius": options.of_topology(
        int | None, "Largest visible distance; half the tree's levels if left out."
    ),
    "gumbel_window": options.of_topology(int | None, "Last tokens that are always visible, 128 if left out."),
    "gumbel_length": options.of_topology(
        int | None, "Tokens of the longest text its tree is made for, 8192 if left out."
    ),
}

#: θ of tiles of one query, for users without calibration text: on the demo model they then read about as much
#: of a whole text as tiles at their default θ (docs/log.md).
SINGLE_THETA = 0.0106

#: Fields whose default depends on others.
_UNSET = ("theta", "theta_decode")


def topology_options(command: Callable[..., None], *, gumbel: bool = False) -> Callable[..., None]:
    """Add an option for every field of :data:`_FIELDS` to ``command``, and with ``gumbel`` of that topology.

    ``command`` takes those that were given as one keyword, ``settings``.
    """
    own = inspect.signature(command)
    fields = {**_FIELDS, **_GUMBEL_FIELDS} if gumbel else _FIELDS
    extra = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if name in _UNSET else getattr(_DEFAULT, name, None),
            annotation=annotation,
        )
        for name, annotation in fields.items()
    ]
    kept = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in own.parameters.values()
        if p.name != "settings"
    ]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in fields}
        command(**values, settings={n: v for n, v in given.items() if v is not None and v != []})

    wrapped.__signature__ = own.replace(parameters=kept + extra)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in kept + extra}
    return wrapped


def config_for(settings: dict[str, Any], tile: int) -> SurgeryConfig:
    """The configuration of the given settings for tiles of ``tile`` queries."""
    settings = {**settings, "tile": tile}
    gumbel = {
        name.removeprefix("gumbel_"): settings.pop(name)
        for name in list(settings)
        if name.startswith("gumbel_")
    }
    if gumbel:
        settings["gumbel"] = gumbel
    if tile == 1:
        # Tiles of one are decode steps: one threshold serves both.
        decode = settings.pop("theta_decode", None)
        settings["theta"] = settings.get("theta", SINGLE_THETA) if decode is None else decode
    return SurgeryConfig(**settings)


def learned_parts(given: list[str] | None, config: SurgeryConfig) -> tuple[Any, ...]:
    """What is learned beside budgets: as given, else weights of channels, and of summaries if any."""
    if given:
        return tuple(split_values(given))
    from llama_surgery.learning.learned import usual_parts

    return usual_parts(config)
