"""Tables of an evaluation, for the terminal."""

import statistics
from collections.abc import Callable
from typing import Any

from rich.table import Table

from llama_surgery.cli.common import escape


def summary_table(results: dict[str, Any]) -> Table:
    """The dense model against its operated forms."""
    table = _models_table(f"{results['model']} at {results['length']:,} tokens", results)
    for name, *cells in _summary_rows(results):
        table.add_row(name, *cells)
    return table


def _models_table(title: str, results: dict[str, Any]) -> Table:
    from llama_surgery.report.summary import columns

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns(results):
        table.add_column(name, justify="right")
    return table


def _summary_rows(results: dict[str, Any]) -> list[list[str]]:
    """Names of measures and cells, remarks on a second line."""
    from llama_surgery.report.summary import rows

    return [
        [row.name, *(cell.text + (f"\n[dim]{cell.note}[/]" if cell.note else "") for cell in row.cells)]
        for row in rows(results)
    ]


def needle_table(results: dict[str, Any]) -> Table:
    """Needles by variant, by kind of value and by length; single cells of all three stay in the JSON."""
    names = [measured["name"] for measured in results["operated"]]
    table = Table(
        title="Needles by variant",
        caption="Change: what the operated model lost of the prompts that the dense model answered, which "
        "alone count, with its 95% interval. Won: prompts that only the operated one answered; they do not "
        "count.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("", "prompts", "dense"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in names:
        for measure in ("", "change, points", "won"):
            table.add_column(f"{name}\n{measure}" if measure else name, justify="right", no_wrap=True)
    for row in _of_variants(results["needle_comparison"]):
        cells = [cell for name in names for cell in _compared(row["operated"][name])]
        part = row.get("kind", f"{row['length']:,} tokens" if "length" in row else "")
        label = f"  {part}" if part else f"[bold]{row['variant']}[/]"
        table.add_row(label, str(row["count"]), f"{row['dense']:.1%}", *cells)
    return table


def _of_variants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant's row, then its kinds, then its lengths."""
    rows = [row for row in rows if not {"kind", "length"} <= row.keys()]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    return sorted(rows, key=lambda row: variants.index(row["variant"]))


def _compared(measured: dict[str, Any]) -> list[str]:
    if measured["difference"] is None:
        return [f"{measured['accuracy']:.1%}", "–", str(measured["won"])]
    change, low, high = (100 * measured[name] for name in ("difference", "low", "high"))
    return [f"{measured['accuracy']:.1%}", f"{change:+.1f} ({low:+.1f} … {high:+.1f})", str(measured["won"])]


def domain_table(results: dict[str, Any]) -> Table:
    """What the summary says of quality and density, for each domain; bins of positions stay in the JSON."""
    table = _models_table("By domain", results)
    for domain, found in results["domains"].items():
        table.add_section()
        table.add_row(f"[bold]{escape(domain)}[/]")
        for name, *cells in _summary_rows(found):
            if name != "Prefill":
                table.add_row(f"  {name}", *cells)
    return table


def continuation_table(results: dict[str, Any]) -> Table:
    """Long texts: the operated models' own, and what they would have written along the dense one's."""
    found = results["continuations"]
    first = next(iter(found.values()))
    table = Table(
        title=f"{len(first['agreement_by_text'])} texts of up to {first['new_tokens']:,} tokens, greedily",
        title_justify="left",
    )
    for name in ("", "dense", *found):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "Tokens written": (f"{first['length_dense']:,.0f}", lambda m: f"{m['length_operated']:,.0f}"),
        "Runs of 4 tokens repeated": (
            f"{first['repetition_dense']:.1%}",
            lambda m: f"{m['repetition_operated']:.1%}",
        ),
        "Agreement along the dense text": ("–", lambda m: f"{m['agreement']:.1%}"),
        "First difference after": ("–", lambda m: _each(m["first_difference"], "{:,}")),
        "Dense margin there, nats": (
            f"median {first['margin']:.2f}",
            lambda m: _each(m["margin_there"], "{:.2f}"),
        ),
    }
    for name, (dense, operated) in rows.items():
        table.add_row(name, dense, *map(operated, found.values()))
    return table


def _each(values: list[Any], shape: str) -> str:
    """Median and range of those that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    low, middle, high = (shape.format(f(known)) for f in (min, statistics.median, max))
    told = middle if len(known) == 1 else f"{middle} ({low} … {high})"
    return told if len(known) == len(values) else f"{told}, {len(values) - len(known)} never"


def tasks_table(results: dict[str, Any]) -> Table:
    """Tasks of lm-evaluation-harness, the dense model beside the operated one."""
    density = results["density"]["total_density"]
    table = Table(
        title=f"{results['model']}, operated at a total density of {density:.1%}", title_justify="left"
    )
    for name in ("task", "metric", "samples", "dense", "operated", "change (95% interval)"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in results["rows"]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        change = f"{row['difference']:+.4f}"
        if row["low"] is not None:
            change += f" ({row['low']:+.4f} … {row['high']:+.4f})"
        figures = (f"{row['dense']:.4f}", f"{row['operated']:.4f}", change)
        table.add_row(escape(row["task"]), escape(metric), str(row["samples"] or "–"), *figures)
    return table
