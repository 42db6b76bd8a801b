"""``llama-surgery compare``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from llama_surgery.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    err,
    escape,
    out,
    print_json,
)
from llama_surgery.cli.compare_processes import measure, measure_in_processes, print_failures
from llama_surgery.cli.topology import config_for, topology_options

_SAMPLES = "Samples"
_RUN = "Run"


@topology_options
def compare(
    *,
    model: ModelArgument,
    text: Annotated[
        Path,
        typer.Option(help="Text to measure on: a .txt file or a folder of them. Not the calibration text."),
    ],
    calibration_text: Annotated[
        Path, typer.Option(help="Text that knobs and thresholds are set on, and that rules learn from.")
    ],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the results. A folder of an earlier run is gone on with.")
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Compare this rule alone with dense. May be repeated. All if left out."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Compare this adapter, as the rule 'learned': a folder that 'learn' or 'operate' wrote."
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Total density wanted of every rule, near field included. May be repeated."),
    ] = None,
    tile: Annotated[
        int,
        typer.Option(
            min=1, help="Neighbouring tokens that share a head's pages.", rich_help_panel="Topology"
        ),
    ] = 64,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a perplexity window.", rich_help_panel=_SAMPLES)
    ] = 8192,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Perplexity windows. 24 if left out, or as many as the text holds.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    needles: Annotated[
        int,
        typer.Option(min=1, help="Planted facts, answered by real generation.", rich_help_panel=_SAMPLES),
    ] = 200,
    needle_length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of a needle prompt. May be repeated. A quarter, half and all of --length if left "
            "out, the shorter ones twice as often.",
            rich_help_panel=_SAMPLES,
        ),
    ] = None,
    needle_variant: Annotated[
        list[str] | None,
        typer.Option(help="Kinds of needles. May be repeated. All if left out.", rich_help_panel=_SAMPLES),
    ] = None,
    needle_batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts of the shortest length answered together; of longer ones fewer.",
            rich_help_panel=_SAMPLES,
        ),
    ] = 8,
    seed: Annotated[
        int, typer.Option(help="Same seed, same windows and prompts.", rich_help_panel=_SAMPLES)
    ] = 0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Begin nothing after this many seconds; run again to go on. 0 only merges.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that share the rules, spread over all GPUs unless --device names one.",
            rich_help_panel=_RUN,
        ),
    ] = 1,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Multiply float32 matrices in TF32 on a GPU.", rich_help_panel="Model"),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    settings: dict[str, Any],
) -> None:
    """Compare this package's topology and published selection rules with dense, at equal density.

    Every rule is run at five or more total densities, from its own floor on, its own knob set on the
    calibration text. Perplexity and planted facts are measured for each, on the same windows and prompts.
    What is finished is kept: the same command goes on where an interrupted one stopped. Example:

    llama-surgery compare demo/books-26m --text demo/text/evaluation.txt
    --calibration-text demo/text/calibration.txt --length 2048 --windows 4 --needles 20 --out out/compare
    """
    began = time.monotonic()
    from llama_surgery.evaluation.compare import DENSITIES, FORMS, LEARNED, PAGES, unfinished
    from llama_surgery.evaluation.needle_variants import VARIANTS
    from llama_surgery.text import refuse_pipes

    unknown = [name for name in rule or [] if name not in FORMS]
    if unknown:
        raise typer.BadParameter(f"--rule {unknown[0]}: there are {', '.join(FORMS)}.")
    if adapter is None and LEARNED in (rule or []):
        raise typer.BadParameter(
            f"--rule {LEARNED} is the rule of an adapter: give its folder with --adapter."
        )
    there = [name for name in FORMS if name != LEARNED or adapter is not None]
    wanted = [name for name in there if not rule or name in ("dense", *rule)]
    failed = False
    if seconds != 0:
        quarter = length // 4
        asked: dict[str, Any] = {
            "forms": wanted,
            "model": model,
            "device": device,
            "dtype": dtype,
            "tf32": tf32,
            "text": text,
            "calibration_text": calibration_text,
            "adapter": adapter,
            "folder": folder,
            # One clock for all processes of a machine.
            "deadline": None if seconds is None else began + seconds,
            "config": config_for(settings, tile),
            "length": length,
            "windows": windows,
            "needles": needles,
            "needle_lengths": needle_length or [quarter, quarter, 2 * quarter, 2 * quarter, length],
            "needle_variants": needle_variant or list(VARIANTS),
            "needle_batch": needle_batch,
            "densities": density or DENSITIES,
            "seed": seed,
        }
        if processes > 1:
            refuse_pipes(text, calibration_text)
            # Heaviest first, a process each: they share the rest.
            order = sorted(wanted, key=lambda name: name not in (PAGES, LEARNED))
            shares = [order[index::processes] for index in range(processes)]
            outcomes = measure_in_processes(shares, **asked)
            failed = print_failures(outcomes)
        else:
            outcomes = [measure(**asked)]
        if unfinished(folder, wanted):  # else another process found the memory
            for cell in (cell for outcome in outcomes for cell in outcome.no_memory):
                err.print(f"Out of memory: {cell}. Lower --needle-batch and run again.", highlight=False)
    if failed and not list((folder / "cells").glob("dense-*.json")):
        raise typer.Exit(1)
    results = write_comparison(folder)
    if json:
        print_json(results)
    else:
        out.print(comparison_table(results))
        names = "results.json, comparison.csv, comparison.svg"
        out.print(f"Written to {folder.resolve()}: {names}.", soft_wrap=True, highlight=False)
        if unfinished(folder, wanted):
            err.print("Not everything is finished: run the command again to go on.", highlight=False)
    if failed:
        raise typer.Exit(1)


def write_comparison(folder: Path) -> dict[str, Any]:
    """Merge what is finished into results.json, comparison.csv and comparison.svg.

    Raises:
        SurgeryError: The dense model is not measured yet, or nothing can be written.
    """
    from llama_surgery.evaluation.compare_result import merge
    from llama_surgery.evaluation.io import write_csv
    from llama_surgery.files import write_atomically, write_json
    from llama_surgery.report.comparison import comparison

    results = merge(folder)
    write_json(folder / "results.json", results)
    write_csv(folder / "comparison.csv", results["rows"])
    svg = comparison(results["rows"])
    write_atomically(folder / "comparison.svg", lambda path: path.write_text(svg, encoding="utf-8"))
    return results


def comparison_table(results: dict[str, Any]) -> Table:
    """Every rule at every density."""
    from llama_surgery.report.comparison import density_with_summary

    settings, dense = results["settings"], results["rows"][0]
    ppl = "–" if dense.get("perplexity") is None else f"{dense['perplexity']:.3f}"
    right = "–" if dense.get("needle") is None else f"{dense['needle']:.1%}"
    table = Table(
        title=f"{settings['model']}, {settings['windows']} windows of {settings['length']:,} tokens, "
        f"{settings['needles']} needles; dense: perplexity {ppl}, needles {right}",
        caption="* a row of a prompt may see what later rows chose. From: the rule's smallest density, "
        "summaries aside. Needles kept: of those that the dense model answered. Intervals are 95%. "
        "Densities count what summaries of unseen pages cost at most.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for name in ("density", "perplexity ÷ dense", "needles kept", "in decode"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in results["rows"][1:]:
        name = ""
        if row["form"] != before:
            table.add_section()
            name = row["title"] + (" *" if row["ahead"] else "")
            name += f", from {row['floor']:.1%}" if row["floor"] < 1 else ""
        before = row["form"]
        shown = density_with_summary(row, "total_density") or density_with_summary(row, "prefill_density")
        decode = density_with_summary(row, "decode_density")
        table.add_row(
            escape(name),
            "–" if shown is None else f"{shown:.1%}",
            _span(row, "perplexity_ratio", "ratio", "{:.3f}"),
            _span(row, "needle_kept", "needle_kept", "{:.0%}"),
            "–" if decode is None else f"{decode:.1%}",
        )
    return table


def _span(row: dict[str, Any], name: str, ends: str, shape: str) -> str:
    if row.get(name) is None:
        return "–"
    return f"{shape} ({shape}–{shape})".format(row[name], row[f"{ends}_low"], row[f"{ends}_high"])
