"""Atomic writes: a file is complete or absent, also when the disk fills up or the process dies."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place.

    Raises:
        SurgeryError: The folder cannot be written or the disk is full; ``path`` is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.touch(exist_ok=False)  # with the user's usual permissions, unlike tempfile
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SurgeryError(
            f"could not write {path}: {error.strerror or error}. Nothing was changed; check the disk and "
            "the permissions."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
