"""Values that are measured once: the same command goes on where it stopped, beside other processes too."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_atomically
from llama_surgery.folders import check_folder
from llama_surgery.topology.router import PageRouter


class Kept:
    """Values in a folder, each in a file named after all that decides it; nowhere without a folder.

    Other settings have other files, so that nothing is mistaken for something else.

    Args:
        folder: Where to; its values lie in ``kept``.
        settings: What decides every value (model, versions …), ready for JSON.

    Raises:
        SurgeryError: The folder holds a model or an adapter.
    """

    def __init__(self, folder: Path | None = None, **settings: Any) -> None:
        self.folder = None if folder is None else check_folder(folder)
        self._settings = settings

    def once(self, part: str, make: Callable[[], Any] | None, *, wait: bool = True, **settings: Any) -> Any:
        """A value: read if it is there, else made and written.

        Args:
            part: What it is, in the file's name.
            make: Makes it, ready for JSON, not None. None where nothing is to be begun any more.
            wait: For another process that is making it.
            settings: What decides it besides the settings of all.

        Returns:
            None where it is not there and is not made, or another process is at it.

        Raises:
            SurgeryError: The file cannot be written, locked or read.
        """
        if self.folder is None:
            return None if make is None else json.loads(json.dumps(make()))
        name = f"{part}-{digest(json.dumps(self._settings | settings, sort_keys=True))}"
        file = self.folder / "kept" / f"{name}.json"
        if not file.exists():
            if make is None:
                return None
            with claimed(self.folder, name, wait=wait) as held:
                if not held:
                    return None
                if not file.exists():  # another process may have been at it a moment ago
                    text = json.dumps(make(), ensure_ascii=False)
                    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SurgeryError(f"{file} is damaged ({error}): remove it to measure again.") from error


@contextlib.contextmanager
def claimed(folder: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Hold a lock of a folder, which is given up however this process ends.

    Yields whether it is held: without ``wait`` another process may have it.

    Raises:
        SurgeryError: The folder cannot be written or locked.
    """
    lock = FileLock(folder / "claims" / name)
    try:
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        pass
    except (OSError, NotImplementedError) as error:
        raise SurgeryError(
            f"could not lock {lock.lock_file}: {error}. Check the disk and the permissions, or give a folder "
            "on a disk that locks files."
        ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def digest(*texts: str) -> str:
    """Short fingerprint of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def found_parts(routers: Mapping[int, PageRouter]) -> dict[str, Any]:
    """What :func:`~llama_surgery.operate` finds of layers itself, ready for JSON: metrics and budgets."""
    return {
        str(index): {
            name: part.tolist() for name, part in router.tensors().items() if name in ("key_weight", "offset")
        }
        for index, router in routers.items()
    }


def with_parts(
    routers: Mapping[int, PageRouter] | None, parts: Mapping[str, Mapping[str, Any]]
) -> dict[int, PageRouter]:
    """The routers that ``parts`` are of, made of those that were given to ``operate()``."""
    made = dict(routers or {})
    for index, values in parts.items():
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        made[int(index)] = dataclasses.replace(made.get(int(index), PageRouter()), **tensors)
    return made


def adapter_digest(config: SurgeryConfig, routers: Mapping[int, Any] | None) -> str:
    """Short fingerprint of a topology: of its whole configuration and of every learned tensor."""
    parts = [json.dumps(config.to_dict(), sort_keys=True)]
    for index, router in sorted((routers or {}).items()):
        for name, part in router.tensors().items():
            content = part.detach().float().cpu().contiguous().numpy().tobytes().hex()
            parts.append(f"{index}.{name} {tuple(part.shape)} {content}")
    return digest(*parts)
