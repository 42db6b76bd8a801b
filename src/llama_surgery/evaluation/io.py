"""Tables of results as files, and the shape of a progress report."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_atomically

#: Called as ``progress(stage, done, total)`` after each step of a stage.
Progress = Callable[[str, int, int], None]


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


def read_started(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier, perhaps interrupted run left in a JSON file, to go on from.

    Args:
        path: The file.
        settings: All that decides the results, as the file has it under ``settings``.

    Returns:
        The file's content, or None where there is no file.

    Raises:
        SurgeryError: The file is something else, or of a run with other settings; the message names them.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SurgeryError(
            f"{path} is not the result of an earlier run ({error!r}). Give another file or remove it."
        ) from error
    wanted = json.loads(json.dumps(settings))  # tuples become lists and keys texts, as in the file
    changed = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if changed:
        told = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in changed)
        raise SurgeryError(
            f"{path} holds a run with other settings ({told}). Give another file, or the settings of that "
            "run to go on with it."
        )
    return content
