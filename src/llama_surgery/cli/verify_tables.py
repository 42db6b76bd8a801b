"""Tables of a verification, for the terminal."""

from typing import Any

from rich.table import Table

#: What a verdict means.
VERDICTS = {
    "kept": "Kept: every loss is within its limit, bounds included, at what was measured.",
    "exceeded": "Exceeded: some loss is beyond its limit, even at the favourable end of its interval.",
    "open": "Open: some interval reaches across its limit, or something was not measured.",
}
_STYLES = {"kept": "green", "exceeded": "red", "open": "yellow"}


def findings_table(report: dict[str, Any]) -> Table:
    """Losses with their intervals, held against the limits."""
    table = Table(
        title=f"{report['settings']['model']}: what the operated model loses",
        caption="95% intervals; positive is worse. Perplexity: relative rise. RULER: points of 100.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("", "at", "over", "loss (interval)", "limit", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for finding in report["findings"]:
        unit = "%" if finding["measure"] == "perplexity" else ""
        loss, low, high = (100 * finding[name] for name in ("loss", "low", "high"))
        few = "" if finding["trusted"] else ", too few"
        count = f"{finding['count']} {'windows' if unit else 'samples'}{few}"
        where = "all lengths" if finding["length"] is None else f"{finding['length']:,} tokens"
        style = _STYLES[finding["state"]]
        table.add_row(
            finding["measure"] + (f": {finding['task']}" if finding["task"] else ""),
            where,
            count,
            f"{loss:+.2f}{unit} ({low:+.2f} … {high:+.2f})",
            f"{100 * finding['limit']:g}{unit}",
            f"[{style}]{finding['state']}[/]",
        )
    return table


def cost_table(report: dict[str, Any]) -> Table:
    """What was read and what it took, by length."""
    table = Table(
        title="What the operated model reads and takes",
        caption="Prefill: a whole forward pass over a window, median. Answer: prompt and answer of a RULER "
        "sample, on average.",
        title_justify="left",
        caption_justify="left",
    )
    columns = ("tokens", "total density", "prefill, dense", "operated", "answer, dense", "operated")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    lengths = {int(length) for length in report["text"]} | {row["length"] for row in report["ruler"]}
    for length in sorted(lengths):
        text = report["text"].get(str(length))
        cells = ["–"] * 3
        if text is not None:
            operated = text["operated"][0]
            cells = [
                f"{operated['density']['total_density']:.1%}",
                *(f"{m['seconds_per_window']:.2f} s" for m in (text["dense"], operated)),
            ]
        table.add_row(
            f"{length:,}",
            *cells,
            *(_answer_time(report["ruler"], name, length) for name in ("dense", "operated")),
        )
    return table


def _answer_time(rows: list[dict[str, Any]], name: str, length: int) -> str:
    own = [row for row in rows if (row["name"], row["length"]) == (name, length)]
    count = sum(row["samples"] for row in own)
    return f"{sum(row['seconds'] for row in own) / count:.2f} s" if count else "–"
