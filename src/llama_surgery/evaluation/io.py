"""Tables of results as files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_surgery.files import write_atomically


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows under the union of their keys, in order of first appearance, atomically.

    Args:
        path: Where to; missing folders are made, an existing file is replaced.
        rows: One mapping a line; a key that a row lacks, and None, are left blank.

    Raises:
        SurgeryError: The file cannot be written; what was there stays.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_atomically(Path(path), write)
