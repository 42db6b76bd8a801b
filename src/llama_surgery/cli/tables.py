"""Tables of an evaluation, for the terminal."""

import functools
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from llama_surgery.cli.console import escape, out

_STYLES = {"kept": "green", "exceeded": "red", "open": "yellow"}


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> Table:
    """A table whose first column is text and whose others are figures; an empty row is a line."""
    table = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left")
    widest = [max((len(row[n]) for row in rows if len(row) > n), default=0) for n in range(len(columns))]
    needed = [max(len(line) for line in (name.split("\n"))) for name in columns]
    if sum(map(max, needed, widest)) + 3 * len(columns) + 1 > out.width:
        # Names of several words are broken where their figures are narrower: 80 characters are soon full.
        wrap = functools.partial(textwrap.wrap, break_long_words=False)
        columns = [
            "\n".join(line for part in name.split("\n") for line in wrap(part, max(width, 1)))
            for name, width in zip(columns, widest, strict=True)
        ]
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=bool(name))
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    return table


def summary_table(results: dict[str, Any]) -> Table:
    """The dense model against its operated forms: measures and cells, remarks on a second line."""
    from llama_surgery.report.results import columns, rows

    shown = [
        [row.name, *(cell.text + (f"\n[dim]{cell.note}[/]" if cell.note else "") for cell in row.cells)]
        for row in rows(results)
    ]
    title = f"{results['model']} at {results['length']:,} tokens"
    return make_table(title, ["", *columns(results)], shown)


def needle_table(results: dict[str, Any]) -> Table:
    """Needles by variant, by kind of value and by length, compared where the dense model could answer.

    What the dense model cannot do, the operation cannot lose. Where it answered its accuracy is 1, so that
    the difference is the operated accuracy less 1, with Wilson's interval.
    """
    from llama_surgery.evaluation.result import DENSE

    names = [measured["name"] for measured in results["operated"]]
    rows = []
    for variant, needles in _grouped(results["needles"], "variant").items():
        parts = {f"[bold]{variant}[/]": needles, **_grouped(needles, "kind")}
        parts |= {f"{length:,} tokens": part for length, part in sorted(_grouped(needles, "length").items())}
        for label, part in parts.items():
            right = [needle["right"] for needle in part]
            cells = [cell for name in names for cell in _compared(right, name)]
            dense = statistics.fmean(answered[DENSE] for answered in right)
            rows.append([label if part is needles else f"  {label}", str(len(part)), f"{dense:.1%}", *cells])
    each = [f"{name}\n{part}" if part else name for name in names for part in ("", "change, points", "won")]
    return make_table(
        "Needles by variant",
        ["", "prompts", "dense", *each],
        rows,
        "Change: what the operated model lost of the prompts that the dense model answered, which alone "
        "count, with its 95% interval. Won: prompts that only the operated one answered; they do not count.",
    )


def _grouped(needles: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    return {
        value: [n for n in needles if n[key] == value] for value in dict.fromkeys(n[key] for n in needles)
    }


def _compared(right: list[dict[str, bool]], name: str) -> list[str]:
    """Accuracy, change and prompts won of an operated model, by which models answered each prompt."""
    from llama_surgery.evaluation.intervals import mean_interval
    from llama_surgery.evaluation.result import DENSE

    kept = [float(answered[name]) for answered in right if answered[DENSE]]
    change = _points(*(end - 1 for end in mean_interval(kept))) if kept else "–"
    won = sum(answered[name] and not answered[DENSE] for answered in right)
    return [f"{statistics.fmean(answered[name] for answered in right):.1%}", change, str(won)]


def _points(middle: float, low: float, high: float) -> str:
    return f"{100 * middle:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def continuation_table(results: dict[str, Any]) -> Table:
    """Long texts: the operated models' own, and what they would have written along the dense one's."""
    found = results["continuations"]
    forms = list(found.values())
    first = forms[0]
    repeated, margin = f"{first['repetition_dense']:.1%}", f"median {first['margin']:.2f}"
    rows = [
        ["Tokens written", f"{first['length_dense']:,.0f}", *(f"{m['length_operated']:,.0f}" for m in forms)],
        ["Runs of 4 tokens repeated", repeated, *(f"{m['repetition_operated']:.1%}" for m in forms)],
        ["Agreement along the dense text", "–", *(f"{m['agreement']:.1%}" for m in forms)],
        ["First difference after", "–", *(_each(m["first_difference"], "{:,}") for m in forms)],
        ["Dense margin there, nats", margin, *(_each(m["margin_there"], "{:.2f}") for m in forms)],
    ]
    title = f"{len(first['agreement_by_text'])} texts of up to {first['new_tokens']:,} tokens, greedily"
    return make_table(title, ["", "dense", *found], rows)


def _each(values: list[Any], shape: str) -> str:
    """Median and range of those that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    low, middle, high = (shape.format(f(known)) for f in (min, statistics.median, max))
    told = middle if len(known) == 1 else f"{middle} ({low} … {high})"
    return told if len(known) == len(values) else f"{told}, {len(values) - len(known)} never"


def tasks_table(name: str, found: dict[str, Any]) -> Table:
    """Tasks of lm-evaluation-harness, the dense model beside the operated one."""
    rows = []
    for row in found["rows"]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        change = f"{row['difference']:+.4f}"
        if row["low"] is not None:
            change += f" ({row['low']:+.4f} … {row['high']:+.4f})"
        figures = (f"{row['dense']:.4f}", f"{row['operated']:.4f}", change)
        rows.append([escape(row["task"]), escape(metric), str(row["samples"] or "–"), *figures])
    density = found["density"]["total_density"]
    return make_table(
        f"{found['model']}, {name}, operated at a total density of {density:.1%}",
        ["task", "metric", "samples", "dense", "operated", "change (95% interval)"],
        rows,
    )


def ruler_table(result: Any, length: int | None) -> Table:
    """Tasks of a ``RulerResult`` at one length, or all if None, with their average and the worst task."""
    from llama_surgery.evaluation.intervals import mean_interval
    from llama_surgery.evaluation.result import DENSE

    def score(scores: list[float]) -> str:
        if not scores:
            return "–"
        mean, low, high = mean_interval(scores)
        return f"{100 * mean:.1f} ({100 * low:.0f} … {100 * high:.0f})"

    def changed(change: Any) -> list[str]:
        if change is None:
            return ["–", "–"]
        return [_points(change.difference, change.low, change.high), f"{change.lost} / {change.won}"]

    changes = {name: result.changes(name, "task", length=length) for name in result.names}
    rows: list[list[str]] = []
    for task in result.settings["tasks"]:
        dense = result.scores(DENSE, task=task, length=length)
        cells = [str(len(dense)), score(dense)]
        for name in result.names:
            cells += [
                score(result.scores(name, task=task, length=length)),
                *changed(changes[name].get(task)),
                f"{result.density(name, task=task, length=length):.1%}" if dense else "–",
            ]
        rows.append([task, *cells])
    averages = [result.average(name, length=length) for name in result.names]
    known = [average for average in averages if average is not None]
    if known:  # of the samples that both answered, every task counts alike
        cells = [str(known[0].count), f"{100 * known[0].dense:.1f}"]
        for average in averages:
            cells += ["–" if average is None else f"{100 * average.operated:.1f}", *changed(average), ""]
        rows += [[], ["average of tasks", *cells]]
    cells = ["", ""]
    for by_task in changes.values():
        worst = min(by_task, key=lambda task: by_task[task].difference, default=None)
        lost = worst is not None and by_task[worst].difference < 0
        cells += [str(worst), changed(by_task[worst])[0], "", ""] if lost else ["none lost", "", "", ""]
    rows.append(["worst task", *cells])
    where = "all lengths" if length is None else f"{length:,} tokens"
    each = [
        f"{escape(name)}\n{part}"
        for name in result.names
        for part in ("score", "change, points", "lost / won", "density")
    ]
    return make_table(
        f"RULER at {where}: {result.settings['model']}",
        ["task", "samples", "dense", *each],
        rows,
        "Scores 0 … 100 with 95% intervals. Change: operated less dense on the same samples; the intervals "
        "of all tasks hold together.",
    )


def comparison_table(found: dict[str, Any]) -> Table:
    """Every rule at every density."""

    def span(row: dict[str, Any], name: str, ends: str, shape: str) -> str:
        if row.get(name) is None:
            return "–"
        return f"{shape} ({shape}–{shape})".format(row[name], row[f"{ends}_low"], row[f"{ends}_high"])

    settings, (dense, *others) = found["settings"], found["rows"]
    rows: list[list[str]] = []
    for _, own in itertools.groupby(others, key=lambda row: row["form"]):
        rows.append([])
        for number, row in enumerate(own):
            floor = f", from {row['floor']:.1%}" if row["floor"] < 1 else ""
            name = "" if number else row["title"] + " *" * row["ahead"] + floor
            ratio = span(row, "perplexity_ratio", "ratio", "{:.3f}")
            kept = span(row, "needle_kept", "needle_kept", "{:.0%}")
            decode = "–" if row.get("decode_density") is None else f"{row['decode_density']:.1%}"
            rows.append([escape(name), f"{row['total_density']:.1%}", ratio, kept, decode])
    return make_table(
        f"{settings['model']}, {settings['windows']} windows of {settings['length']:,} tokens, "
        f"{settings['needles']} needles; dense: perplexity {dense['perplexity']:.3f}, needles "
        f"{dense['needle']:.1%}",
        ["", "density", "perplexity ÷ dense", "needles kept", "in decode"],
        rows,
        "* a row of a prompt may see what later rows chose. From: the rule's smallest density. Needles kept: "
        "of those that the dense model answered. Intervals are 95%.",
    )


def gate_table(gate: dict[str, Any]) -> Table:
    """Losses with their intervals, held against the limits."""
    rows = []
    for finding in gate["findings"]:
        unit = "%" if finding["measure"] == "perplexity" else ""
        loss, style = "not measured", _STYLES[finding["state"]]
        if finding["loss"] is not None:
            middle, low, high = (100 * finding[name] for name in ("loss", "low", "high"))
            loss = f"{middle:+.2f}{unit} ({low:+.2f} … {high:+.2f})"
        few = "" if finding["trusted"] else ", too few"
        where = f": {finding['where']}" if finding["where"] else ""
        name, count = f"{finding['form']}, {finding['measure']}{where}", f"{finding['count']}{few}"
        limit, state = f"{100 * finding['limit']:g}{unit}", f"[{style}]{finding['state']}[/]"
        rows.append([name, count, loss, limit, state])
    return make_table(
        "What may be lost, and what was",
        ["", "samples", "loss (interval)", "limit", "state"],
        rows,
        "95% intervals; positive is worse. Perplexity: relative rise. Others: points of 100.",
    )
