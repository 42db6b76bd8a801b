"""How ``llama-surgery evaluate`` writes and shows what it found."""

from pathlib import Path
from typing import Any

from llama_surgery.cli import tables
from llama_surgery.cli.console import err, out, print_json
from llama_surgery.cli.evaluate_parts import Parts

#: What a verdict means.
VERDICTS = {
    "kept": "Kept: every loss is within its limit, bounds included, at what was measured.",
    "exceeded": "Exceeded: some loss is beyond its limit, even at the favourable end of its interval.",
    "open": "Open: some interval reaches across its limit, or something was not measured.",
}


def write_and_print(parts: Parts, folder: Path | None, json: bool) -> None:
    """Write results, tables and the figure of a comparison, and show them."""
    from llama_surgery.files import write_atomically, write_csv, write_json
    from llama_surgery.report.comparison import comparison

    results = parts.results
    if folder is not None:
        write_json(folder / "results.json", results)
        for name, rows in parts.rows.items():
            write_csv(folder / f"{name}.csv", rows)
        if "against" in results:
            svg = comparison(results["against"]["rows"])
            write_atomically(folder / "comparison.svg", lambda path: path.write_text(svg, encoding="utf-8"))
    if json:
        print_json(results)
        return
    shown: list[Any] = []
    if "dense" in results:
        shown.append(tables.summary_table(results))
        harder = results["needles"] and len(parts.needle_variants) > 1
        shown += [tables.needle_table(results)] if harder else []
        shown += [tables.continuation_table(results)] if "continuations" in results else []
    if parts.ruler is not None:
        lengths = parts.ruler.settings["lengths"]
        shown += [
            tables.ruler_table(parts.ruler, n) for n in (*lengths, *([None] if len(lengths) > 1 else []))
        ]
    shown += [tables.tasks_table(name, found) for name, found in results.get("lm_eval", {}).items()]
    if "against" in results:
        shown.append(tables.comparison_table(results["against"]))
    if "gate" in results:
        shown.append(tables.gate_table(results["gate"]))
    for table in shown:
        out.print(table)
    if "gate" in results:
        out.print(f"[bold]{VERDICTS[results['gate']['verdict']]}[/]", soft_wrap=True, highlight=False)
    unfinished = parts.ruler is not None and not parts.ruler.complete
    if unfinished or results.get("against", {}).get("unfinished"):
        err.print("Not everything is finished: run the command again to go on.", highlight=False)
    if folder is not None:
        out.print(f"Written: {folder.resolve()}", soft_wrap=True, highlight=False)
