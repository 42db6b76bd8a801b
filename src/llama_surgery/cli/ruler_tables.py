"""Tables of a RULER run, for the terminal."""

from typing import Any

from rich.table import Table

from llama_surgery.cli.common import escape


def ruler_table(result: Any, length: int | None) -> Table:
    """Tasks at one length, or over all lengths if None, with their average and the worst task.

    Args:
        result: A :class:`~llama_surgery.evaluation.ruler.result.RulerResult`.
        length: Tokens of prompt and answer, or None.
    """
    from llama_surgery.evaluation.intervals import mean_interval
    from llama_surgery.evaluation.result import DENSE

    where = "all lengths" if length is None else f"{length:,} tokens"
    table = Table(
        title=f"RULER at {where}: {result.settings['model']}",
        caption="Scores 0 … 100 with 95% intervals. Change: operated less dense on the same samples; the "
        "intervals of all tasks hold together.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("task", no_wrap=True)
    for column in ("samples", "dense"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in result.names:
        for column in ("score", "change, points", "lost / won", "density"):
            table.add_column(f"{escape(name)}\n{column}", justify="right", no_wrap=True)
    changes = {name: result.changes(name, "task", length=length) for name in result.names}
    for task in result.settings["tasks"]:
        scores = result.scores(DENSE, task=task, length=length)
        if not scores:
            table.add_row(task, "0", "–", *["–"] * (4 * len(result.names)))
            continue
        cells = [str(len(scores)), _score(*mean_interval(scores))]
        for name in result.names:
            own, change = result.scores(name, task=task, length=length), changes[name].get(task)
            cells += [
                _score(*mean_interval(own)) if own else "–",
                _change(change),
                "–" if change is None else f"{change.lost} / {change.won}",
                f"{result.density(name, task=task, length=length):.1%}",
            ]
        table.add_row(task, *cells)
    table.add_section()
    _add_average(table, result, length)
    _add_worst(table, changes)
    return table


def _add_average(table: Table, result: Any, length: int | None) -> None:
    """Every task counts alike. Dense and operated are averages over the samples that both answered."""
    averages = [result.average(name, length=length) for name in result.names]
    known = [average for average in averages if average is not None]
    if not known:
        return
    cells = [str(known[0].count), f"{100 * known[0].dense:.1f}"]
    for average in averages:
        score = "–" if average is None else f"{100 * average.operated:.1f}"
        told = "–" if average is None else f"{average.lost} / {average.won}"
        cells += [score, _change(average), told, ""]
    table.add_row("average of tasks", *cells)


def _add_worst(table: Table, changes: dict[str, dict[str, Any]]) -> None:
    cells = ["", ""]
    for by_task in changes.values():
        worst = min(by_task, key=lambda task: by_task[task].difference, default=None)
        if worst is None or by_task[worst].difference >= 0:
            cells += ["none lost", "", "", ""]
        else:
            cells += [worst, _change(by_task[worst]), "", ""]
    table.add_row("worst task", *cells)


def _score(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} ({100 * low:.0f} … {100 * high:.0f})"


def _change(change: Any) -> str:
    if change is None:
        return "–"
    return f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} … {100 * change.high:+.1f})"
