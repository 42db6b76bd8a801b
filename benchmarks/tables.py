"""Writes the tables of README.md and docs/*.md from the CSV files in benchmarks/results.

    python benchmarks/tables.py           # write them
    python benchmarks/tables.py --check   # fail if one is not what its CSV says

A table stands between two comments, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, where NAME is a key
of TABLES. Everything else of a page is left alone.
"""

import argparse
import re
import sys
from collections.abc import Callable

import loss_by_density
import quality_tables
import real_speed_table
import speed_tables
import steps_table
from csv_tables import ROOT

TABLES: dict[str, Callable[[], str]] = {
    "real": quality_tables.real,
    "frontier": loss_by_density.table,
    "sparse-steps": steps_table.table,
    "lost-and-won": real_speed_table.lost_and_won,
    "real-speed": real_speed_table.real_speed,
    "serving": speed_tables.serving,
    "results": quality_tables.quality,
    "attention": speed_tables.attention,
    "attention-parts": speed_tables.attention_parts,
    "decode": speed_tables.decode,
    "paged": speed_tables.paged,
    "learning": quality_tables.learning,
    "rules": quality_tables.rules,
    "end-to-end": speed_tables.end_to_end,
    "transfer": quality_tables.transfer,
}


def filled(text: str) -> str:
    """The page with every table in it made anew."""
    for name in re.findall(r"<!-- ([\w-]+): begin -->", text):
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}: known are {', '.join(TABLES)}.")
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a table is out of date"
    )
    given = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if old != new:
            stale.append(str(page.relative_to(ROOT)))
            if not given.check:
                page.write_text(new, encoding="utf-8")
    if given.check and stale:
        print(f"out of date: {', '.join(stale)}. Run: python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
