"""Raw results of benchmarks/real.py: one folder a study, one file of JSON lines a form."""

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from json_lines import append_line, read_lines, read_started

from llama_surgery.evaluation.kept import digest
from llama_surgery.files import write_json

#: In order of tables.
FORMS = ("dense", "rounding", "operated", "one-theta", "tokens", "blocks")
#: Kinds of samples, as they begin the name of an item: ``window 3``, ``needle 17``, ``ruler vt 4``.
WINDOW, NEEDLE, RULER = "window", "needle", "ruler"

#: Of an item: ``loss`` and densities, ``right``, or ``score`` and ``answer``; seconds, device and date.
Found = dict[str, Any]


def canonical(settings: Mapping[str, Any]) -> str:
    """Settings as a row of the table has them."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def prefill_part(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter to a text read in one call: windows are shared by both ways to decode."""
    return {name: value for name, value in settings.items() if name not in ("decode", "theta_decode")}


class Results:
    """Everything measured of one model, length and text.

    Args:
        folder: Of the study. Processes that measure different forms may share it.
        settings: What all results depend on, the form aside; None to read what is there.

    Raises:
        SurgeryError: The folder holds a study with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        file = folder / "study.json"
        if settings is not None and read_started(file, settings) is None:
            write_json(file, {"settings": dict(settings)})
        self.settings = json.loads(file.read_text(encoding="utf-8"))["settings"]

    @property
    def title(self) -> str:
        """Of tables."""
        return f"{self.settings['model']}, {self.settings['length']:,} tokens, {self.settings['text']}"

    def begin(self, form: str, settings: Mapping[str, Any]) -> None:
        """Notes that there is a form with these settings."""
        if dict(settings) not in self.listed(form):
            append_line(self._file(form), {"key": _key(settings), "settings": dict(settings)})

    def add(self, form: str, settings: Mapping[str, Any], item: str, found: Found) -> None:
        """Keeps what was found for an item."""
        line = {"key": _key_for(item, settings), "item": item, **found}
        append_line(self._file(form), {**line, "date": datetime.date.today().isoformat()})

    def listed(self, form: str) -> list[dict[str, Any]]:
        """Settings with which a form was measured."""
        lines = read_lines(self._file(form))
        by_key = {line["key"]: line["settings"] for line in lines if "settings" in line}
        return list(by_key.values())

    def items(self, form: str, settings: Mapping[str, Any]) -> dict[str, Found]:
        """What was found for every item. Where two processes measured one, what was there first."""
        found: dict[str, Found] = {}
        for line in read_lines(self._file(form)):
            if "item" in line and line["key"] == _key_for(line["item"], settings):
                found.setdefault(line["item"], line)
        return found

    def _file(self, form: str) -> Path:
        return self.folder / f"{form}.jsonl"


def studies(folder: Path) -> Iterator[Results]:
    """All studies in a work folder."""
    for file in sorted(folder.glob("*/study.json")):
        yield Results(file.parent)


def _key(settings: Mapping[str, Any]) -> str:
    return digest(canonical(settings))


def _key_for(item: str, settings: Mapping[str, Any]) -> str:
    return _key(prefill_part(settings) if item.startswith(f"{WINDOW} ") else settings)
