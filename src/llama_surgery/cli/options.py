"""Options that several commands have, and how options are declared."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_surgery import __version__
from llama_surgery.cli.common import Dtype
from llama_surgery.cli.values import SEED, SHARE


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
    typer.Argument(
        help="Adapter folder written by 'llama-surgery operate'; the default topology without.",
    ),
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
    "Queries below this position see everything. If left out, where thresholds are set on a GPU, the "
    "position from which on prompts are read faster there; else 0.",
    min=0,
)
DecodeDensity = of_topology(
    float | None,
    "The same share for decode steps. Left out, they read everything, as the dense model does.",
    **SHARE,
)
