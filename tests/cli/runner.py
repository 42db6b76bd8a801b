"""Runs the command line inside the test's process."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from llama_surgery.cli import app

#: A topology that has a far field within a few hundred tokens.
SMALL = ["--chunk-size", "64", "--page-size", "16", "--window", "32", "--tile", "16"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
