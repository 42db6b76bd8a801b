"""``llama-surgery report``."""

from pathlib import Path
from typing import Annotated

import typer

from llama_surgery.cli import options
from llama_surgery.cli.console import say, status


def report(
    results: Annotated[
        Path, typer.Argument(help="Results file, as 'llama-surgery evaluate --out' writes it.")
    ],
    out_file: options.own(Path, "The HTML file to write.", "--out") = Path("report.html"),
    frontier: options.own(
        Path | None,
        "CSV of many measured configurations, drawn as quality against density. Its columns are the "
        "fields of llama_surgery.report.frontier.FrontierPoint.",
    ) = None,
) -> None:
    """Draw a results file as one self-contained HTML page, which loads nothing from outside."""
    with status("Drawing the report …"):
        from llama_surgery.report.results import read_results

        found = read_results(results)
        from llama_surgery.report.page import write_report

        write_report(found, out_file, frontier=frontier)
    say(f"Report: {out_file.resolve()}")
