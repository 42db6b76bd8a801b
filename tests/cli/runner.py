"""Runs the command line inside the test's process."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from llama_surgery.cli import app
from llama_surgery.cli.console import err, out

#: A topology that has a far field within a few hundred tokens.
SMALL = ["--chunk-size", "64", "--page-size", "16", "--window", "32", "--tile", "16"]

#: Wide enough for every table: what a test looks for must not be wrapped.
WIDTH = 200


def run(*arguments: str | Path) -> Any:
    # Consoles may have taken their width from the environment when they were made.
    out.width = err.width = WIDTH
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(WIDTH)})
