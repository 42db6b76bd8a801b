"""``llama-surgery export``."""

from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli import options
from llama_surgery.cli.console import escape, out, print_json, status
from llama_surgery.cli.run import thresholds


def export(
    model: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face checkpoint in safetensors, or a GGUF file.")
    ],
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="[ADAPTER] OUT",
            help="Adapter folder written by 'operate' or 'learn', if there is one, and the folder to write.",
        ),
    ],
    json: options.Json = False,
) -> None:
    """Write an operated model as a checkpoint folder for a serving engine (docs/serving.md).

    The folder holds the weights as they are, the topology in its config.json, and learned corrections
    beside them. Without an adapter the documented default topology is written, whose thresholds are not
    calibrated for your model. transformers opens the folder as the dense model.
    """
    if len(folders) > 2:
        raise typer.BadParameter("give MODEL, an ADAPTER if there is one, and OUT.")
    *adapters, target = folders
    with status(f"Exporting {escape(str(model))} …"):
        from llama_surgery.serving.export import export as write

        config = write(model, target, adapters[0] if adapters else None)
    if json:
        print_json({"folder": str(target), "config": config.to_dict()})
        return
    out.print(f"Thresholds: {thresholds(config)}.")
    out.print(f"Folder: {target.resolve()}", soft_wrap=True, highlight=False)
