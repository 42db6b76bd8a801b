"""Options that several commands have, and how options are declared."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_surgery import __version__
from llama_surgery.cli.common import Dtype
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.text import parse_length


def _share(given: object) -> float:
    """The share that ``6%`` or ``0.06`` stands for, between 0 and 1."""
    text = str(given)
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 < found < 1:
        raise typer.BadParameter(f"{text!r}: give a share above 0 and below 1, such as 1% or 0.01.")
    return found


def _tokens(given: object) -> int:
    try:
        return parse_length(str(given))
    except SurgeryError as error:
        raise typer.BadParameter(str(error)) from error


#: What an option that takes a share is declared with, and one that takes a number of tokens, as 8192 or 8k.
SHARE = {"parser": _share, "metavar": "SHARE"}
TOKENS = {"parser": _tokens, "metavar": "TOKENS"}
#: Options that the user gave to the running command, by the names of its parameters.
GIVEN: ContextVar[dict[str, str]] = ContextVar("given")
#: What PyTorch and random take.
SEED = {"min": 0, "max": 2**63 - 1}


def split_values(given: Sequence[str]) -> list[str]:
    """Values of an option that may be repeated and may hold several after commas, each once."""
    parts = [part.strip() for item in given for part in item.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def token_counts(given: Sequence[str]) -> list[int]:
    """Numbers of tokens such as ``8192`` or ``8k`` (1,024 tokens each), ascending, at least one."""
    counts = sorted({parse_length(part) for part in split_values(given)})
    if not counts:
        raise SurgeryError("no length: give a number of tokens, such as 8192 or 8k.")
    return counts


def refuse(names: Iterable[str], why: str) -> None:
    """Wrong usage if the user gave any of these parameters of the running command; defaults are none."""
    if wrong := [option for name, option in GIVEN.get({}).items() if name in names]:
        raise typer.BadParameter(f"{', '.join(wrong)}: {why}")


def _version(value: bool) -> None:
    if value:
        print(f"llama-surgery {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
]


def declared(panel: str | None, kind: Any, help: str, *names: str, **checks: Any) -> Any:
    """The annotation of a command's option, shown under ``panel``."""
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel, **checks)]


#: Options of their own panel, and those under the panel of the model, the topology and the samples.
own = functools.partial(declared, None)
of_model = functools.partial(declared, "Model")
of_topology = functools.partial(declared, "Topology")
of_samples = functools.partial(declared, "Samples")

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a Hugging Face checkpoint with its tokenizer, a GGUF file, or a name on the Hub."
    ),
]
Shape = Annotated[
    str,
    typer.Argument(
        help="Folder of a checkpoint, a config.json, a GGUF file, or a name on the Hub: no weights are read."
    ),
]
AdapterArgument = Annotated[
    Path | None,
    typer.Argument(help="Adapter folder written by 'llama-surgery operate'; the default topology without."),
]
Device = of_model(
    str,
    "Where to run: cpu, cuda, cuda:1, mps … 'auto' takes a GPU if there is one, 'split' spreads the layers "
    "over all GPUs (needs accelerate).",
)
Precision = of_model(Dtype, "Precision. 'auto' is float32 on a CPU and what the checkpoint holds elsewhere.")
Json = own(bool, "Print JSON instead of tables (progress goes to standard error).", "--json")
Seed = of_samples(int, "Same seed, same samples.", **SEED)
Batch = of_samples(int, "Samples answered together: more is faster on a GPU.", min=1)
Adapter = of_topology(Path | None, "Adapter folder written by 'llama-surgery operate'.")
Tile = of_topology(int, "Neighbouring tokens that share what they read in prefill.", min=1)
CalibrationText = of_topology(
    Path | None, "Text (a .txt file or a folder of them) on which thresholds are set so that --density holds."
)
Density = of_topology(
    float | None,
    "Largest share of all (query, key) pairs that may be read from the far field, such as 6% or 0.06.",
    **SHARE,
)
DenseUntil = of_topology(
    int | None,
    "Queries below this position see everything. If left out, where thresholds are set: the position from "
    "which on prompts are read faster, timed on a GPU, 4,096 on a CPU; else 0.",
    min=0,
)
DecodeDensity = of_topology(
    float | None,
    "The same share for decode steps. Left out, they read everything, as the dense model does.",
    **SHARE,
)

#: Steps of learning, unless told otherwise: what docs/learning.md was measured with.
STEPS = 200
_DEFAULT = SurgeryConfig()

#: Field of the configuration → type and help of its option.
_FIELDS: dict[str, Any] = {
    "page_size": of_topology(int, "Keys of a page, the block that is read as a whole."),
    "chunk_size": of_topology(int, "Tokens of a chunk: each gets a tree of its own."),
    "window": of_topology(int, "Tokens that always stay in the near field, which is read in full."),
    "theta": of_topology(
        float | None,
        "Open a page when its expected share of a head's attention exceeds this. Set by --density.",
    ),
    "theta_decode": of_topology(
        float | None, "The same for decoding, token by token: 0 reads everything. Set by --decode-density."
    ),
    "summary": of_topology(
        str, "What stands in for the pages that are not read: page, a mean of each, or none."
    ),
    "backend": of_topology(str, "Who executes the plan: auto, reference, and of pages gather and triton."),
}

#: The same for ``topology="gumbel"``, of commands that take it.
_GUMBEL_FIELDS: dict[str, Any] = {
    "topology": of_topology(
        str, "pages, or gumbel: the preprint's content router, with the options --gumbel-…"
    ),
    "gumbel_arities": of_topology(
        list[int] | None,
        "Children of a node of its tree, 2 if left out. Repeated, one for each of equal groups of heads.",
    ),
    "gumbel_radius": of_topology(int | None, "Largest visible distance; half the tree's levels if left out."),
    "gumbel_window": of_topology(int | None, "Last tokens that are always visible, 128 if left out."),
    "gumbel_length": of_topology(
        int | None, "Tokens of the longest text its tree is made for, 8192 if left out."
    ),
}

#: All that makes up a topology; what of it only pages have; and what ``plan`` does not ask.
TOPOLOGY = (*_FIELDS, *_GUMBEL_FIELDS, "tile")
_OF_PAGES = _FIELDS.keys() - {"backend"}
_OF_RUNS = ("theta", "theta_decode", "backend")

#: θ of tiles of one query, for users without calibration text: on the demo model they then read about as much
#: of a whole text as tiles at their default θ (docs/log.md).
SINGLE_THETA = 0.0106

#: Fields whose default depends on others.
_UNSET = ("theta", "theta_decode")


def topology_options(
    command: Callable[..., None], *, gumbel: bool = False, runs: bool = True
) -> Callable[..., None]:
    """Add an option for every field of :data:`_FIELDS` to ``command``, and with ``gumbel`` of that topology.

    Without ``runs`` it has none for what only a model that runs depends on.

    ``command`` takes those that were given as one keyword, ``settings``.
    """
    own = inspect.signature(command)
    fields = {**_FIELDS, **_GUMBEL_FIELDS} if gumbel else _FIELDS
    fields = {name: option for name, option in fields.items() if runs or name not in _OF_RUNS}
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
        if given.get("topology") == "gumbel":
            refuse(_OF_PAGES, "only --topology pages has it: leave it out.")
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
