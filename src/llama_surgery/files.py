"""Atomic writes: a file is complete or absent, also when the disk fills up or the process dies.

Nothing here replaces what belongs to somebody else: see :mod:`llama_surgery.folders`.
"""

import contextlib
import csv
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError
from llama_surgery.folders import check_file

Write = Callable[[Path], object]


def write_atomically(path: Path, write: Write, *, own: bool = False) -> None:
    """Let ``write`` fill a temporary file beside ``path``, or what that points at, then move it into place.

    With ``own`` the name may be one of models and adapters: the caller has made sure whose the file is.

    Raises:
        SurgeryError: The folder cannot be written, the disk is full, or the file is not one to replace;
            ``path`` is as it was.
    """
    write_together({path: write}, own=own)


def write_together(files: Mapping[Path, Write], *, own: bool = False) -> None:
    """As :func:`write_atomically`, for files that belong together: none is replaced before all are complete.

    They are moved into place in the order given.

    Raises:
        SurgeryError: As there; files that were moved before one that could not be are named.
    """
    moved: list[str] = []
    filled: list[tuple[Path, Path]] = []
    path = next(iter(files))
    try:
        for path, write in files.items():
            target = check_file(path, own=own)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            filled.append((temporary, target))
            temporary.touch(exist_ok=False)  # with the user's usual permissions, unlike tempfile
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        for temporary, path in filled:
            os.replace(temporary, path)
            moved.append(str(path))
    except OSError as error:
        done = f"{', '.join(moved)} had been replaced before" if moved else "Nothing was changed"
        raise SurgeryError(
            f"could not write {path}: {error.strerror or error}. {done}; check the disk and the permissions."
        ) from error
    finally:
        for temporary, _ in filled:
            with contextlib.suppress(OSError):  # what went wrong is being told
                temporary.unlink()


def write_json(path: Path, value: Any, *, own: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, as_json(value), own=own)


def json_text(value: Any, *, sort_keys: bool = False) -> str:
    """``value`` as indented JSON, null in place of infinity and NaN, for which JSON has no numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"


def as_json(value: Any) -> Write:
    """What fills a file with ``value`` as indented JSON."""
    text = json_text(value, sort_keys=True)
    return lambda file: file.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows under the union of their keys, in order of first appearance, atomically.

    A key that a row lacks, and None, are left blank.

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
