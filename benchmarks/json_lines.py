"""Results as files of JSON lines, which several processes add to."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError


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


def append_line(path: str | Path, value: Any) -> None:
    """Adds a JSON value to a file of lines; several processes may add to one file at a time.

    A line is written in one call that appends, so that lines never mix. After a line that a killed process
    left unfinished it begins a new one.

    Args:
        path: The file; it and its folder are made where they are missing.
        value: What JSON can hold.

    Raises:
        SurgeryError: The file cannot be written.
    """
    path = Path(path)
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) != len(line):
                raise OSError(None, "the disk is full")
    except OSError as error:
        raise SurgeryError(
            f"could not write {path}: {error.strerror or error}. Check the disk and the permissions; what "
            "was there is still there."
        ) from error


def read_lines(path: str | Path) -> list[Any]:
    """Values that :func:`append_line` added, without unfinished lines; none where there is no file."""
    path = Path(path)
    values = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values
