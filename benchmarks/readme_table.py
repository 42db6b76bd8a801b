"""Writes the results table of the README from benchmarks/results/acceptance.csv.

    python benchmarks/readme_table.py

The CSV is what ``llama-surgery evaluate --csv`` writes: one row for each model measured in one run, the dense
one first. The README holds the table between two comments and is left alone otherwise.
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "acceptance.csv"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(rows: list[dict[str, str]]) -> str:
    """Markdown of the rows, with their conditions below."""
    lines = [
        "| | perplexity | ÷ dense (95% interval) | needles answered | far density | total density |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["name"], f"{float(row['perplexity']):.2f}"]
        if row["name"] == "dense":
            cells += ["–", _percent(row["needle_accuracy"]), "–", "100%"]
        else:
            cells[0] = f"operated, {row['name']}"
            ratio, low, high = (float(row[name]) for name in ("perplexity_ratio", "ratio_low", "ratio_high"))
            cells.append(f"{ratio:.4f} ({low:.4f} … {high:.4f})")
            cells += [_percent(row[name]) for name in ("needle_accuracy", "far_density", "total_density")]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    conditions = (
        f"{first['model']}, {int(first['windows'])} windows of {int(first['length']):,} tokens, "
        f"{first['needles']} needles by greedy generation, seed {first['seed']}, "
        f"{first['dtype']} on {first['device']}, PyTorch {first['torch']}, "
        f"transformers {first['transformers']}."
    )
    return "\n".join([*lines, "", conditions])


def _percent(value: str) -> str:
    return f"{float(value):.1%}" if value else "–"


def main() -> int:
    if not SOURCE.is_file():
        print(f"{SOURCE.relative_to(ROOT)} is missing: see its command in the README.", file=sys.stderr)
        return 1
    with open(SOURCE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
