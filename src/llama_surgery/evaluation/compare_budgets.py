"""Densities and settings of the forms of a comparison, in files so that a later run has the same ones."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.compare_forms import Form, densities_between
from llama_surgery.evaluation.compare_samples import digest
from llama_surgery.files import write_json
from llama_surgery.topology.router import PageRouter

#: Total density that is measured first.
FIRST = 0.18


class Budgets:
    """Densities at which a form is measured, and what gives them, found once.

    Args:
        folder: Of the comparison.
        form: The form.
        requested: Total densities wanted.
        full: Whether a full budget is measured too.
        adapter: Fingerprint of the adapter that the form follows, if it follows one.

    Raises:
        SurgeryError: The folder has this form with another adapter.
    """

    def __init__(
        self, folder: Path, form: Form, requested: Sequence[float], *, full: bool, adapter: str | None
    ) -> None:
        self._folder, self._form = folder, form
        # Of processes that come together one makes them for all.
        with claimed(folder, f"{form.name}-budgets", wait=True):
            self._content = read_budgets(folder, form.name, adapter)
            if self._content is None:
                self._content = self._made(requested, full)
                if adapter is not None:
                    self._content["adapter"] = adapter
                write_json(_file(folder, form.name), self._content)

    def _made(self, requested: Sequence[float], full: bool) -> dict[str, Any]:
        floor = self._form.floor()
        targets = [1.0]
        if floor < 1:
            targets = densities_between(floor, requested)
            targets.sort(key=lambda target: abs(math.log(target / FIRST)))
        if full:
            targets.append(1.0)
        return {"title": self._form.title, "ahead": self._form.ahead, "floor": floor, "targets": targets}

    @property
    def targets(self) -> list[float]:
        """Total densities, the one to measure first in front."""
        return self._content["targets"]

    def setting(self, target: float) -> dict[str, Any]:
        """What gives this total density on calibration text."""
        # A file for each: processes that measure different densities of a form do not write over each other.
        file = self._folder / "settings" / f"{self._form.name}-{target:.4f}.json"
        if not file.exists():
            write_json(file, self._form.setting(target))
        return json.loads(file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def claimed(folder: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Hold a lock of a comparison's folder, which is given up however this process ends.

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


def read_budgets(folder: Path, name: str, adapter: str | None = None) -> dict[str, Any] | None:
    """What is kept of a form, or None where there is nothing yet.

    Args:
        folder: Of the comparison.
        name: Of the form.
        adapter: Fingerprint of the adapter that the form follows, if it follows one.

    Raises:
        SurgeryError: It is of another adapter.
    """
    file = _file(folder, name)
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("adapter") != adapter:
        raise SurgeryError(
            f"{folder} compared another adapter (fingerprint {content.get('adapter')} there, {adapter} now): "
            "give that one to go on, or another folder."
        )
    return content


def targets_of(folder: Path, name: str) -> list[float]:
    """Total densities at which a form is measured; none where they are not known yet."""
    file = _file(folder, name)
    return json.loads(file.read_text(encoding="utf-8"))["targets"] if file.exists() else []


def adapter_digest(config: SurgeryConfig, routers: Mapping[int, PageRouter]) -> str:
    """Short fingerprint of an adapter: of its whole configuration and of every learned correction."""
    parts = [json.dumps(config.to_dict(), sort_keys=True)]
    for index, router in sorted(routers.items()):
        for name, part in router.tensors().items():
            content = part.detach().float().cpu().contiguous().numpy().tobytes().hex()
            parts.append(f"{index}.{name} {tuple(part.shape)} {content}")
    return digest(*parts)


def _file(folder: Path, name: str) -> Path:
    return folder / "budgets" / f"{name}.json"
