"""What every command does before and after its work: outputs checked, errors and Ctrl-C told in one line."""

import errno
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from llama_surgery.cli.console import err, escape, say
from llama_surgery.cli.options import GIVEN
from llama_surgery.errors import SurgeryError
from llama_surgery.folders import check_file, check_folder

#: What names outputs, the last of several values; parameters that mean a folder are called after it.
_OUTPUTS = {"--out", "folders"}
#: Commands that go on where they stopped, and what they go on from.
_RESUMED = {"evaluate": ("kept/*.json",), "learn": ("checkpoint-*.pt", "states/*")}
#: Exit code of a command that Ctrl-C ended.
INTERRUPTED = 130


class Commands(TyperGroup):
    """Commands whose expected errors end in one clear line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with 1 when it raises one of the package's own errors, or cannot write."""
        log, notes = logging.getLogger("llama_surgery"), _Notes()
        log.addHandler(notes)
        try:
            return super().invoke(ctx)
        except (SurgeryError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read the output has read enough
            why = (
                f"{error}. Check the disk and the permissions." if isinstance(error, OSError) else str(error)
            )
            say(f"[bold red]Error:[/] {escape(why)}", err)
            raise typer.Exit(1) from error
        finally:
            log.removeHandler(notes)


class _Notes(logging.Handler):
    """Prints the package's own warnings, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        told = record.getMessage()
        if told not in self._seen and _speaks():
            self._seen.add(told)
            say(f"[bold yellow]Note:[/] {escape(told)}", err)


class Command(TyperCommand):
    """A command that looks at where it will write before it works, and says what is left when interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit with 130 on Ctrl-C. The context may hold how that is to be answered."""
        began = time.time()
        sources = {str(p.name): ctx.get_parameter_source(str(p.name)) for p in self.params}
        names = {str(p.name): p.opts[0] for p in self.params}
        GIVEN.set({n: names[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"})
        named = {p.name for p in self.params if _OUTPUTS & set(p.opts)}
        given = {name: value for name, value in ctx.params.items() if name in named and value is not None}
        # Of what type they are here depends on the release of typer.
        outputs = {n: Path(v[-1] if isinstance(v, (list, tuple)) else v) for n, v in given.items()}
        try:
            if ctx.obj is not None:
                signal.signal(signal.SIGINT, ctx.obj)
            for name, path in outputs.items():
                checked_output(path, folder="folder" in name)
            inputs = [v for n, v in ctx.params.items() if n not in named and isinstance(v, (str, Path))]
            for name, path in outputs.items():
                if "folder" not in name and any(_same(path, Path(other)) for other in inputs):
                    raise SurgeryError(f"{path} is named twice, and would be overwritten: name another file.")
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if _speaks():
                told = _left(str(self.name), list(outputs.values()), began)
                say(f"Interrupted{told}", err)
            raise typer.Exit(INTERRUPTED) from error


def _speaks() -> bool:
    """Of several processes that learn together, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def checked_output(path: Path, *, folder: bool = False) -> Path:
    """``path``, if a file or a ``folder`` can be written there: better known before the work than after.

    Raises:
        SurgeryError: Something is in the way, or it belongs to somebody else.
    """
    try:
        if not folder:
            check_file(path)
        else:
            check_folder(path)
        place = Path(os.path.realpath(path))
        place = place if folder else place.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise SurgeryError(f"{path}: cannot be created, as {place} is a file.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise SurgeryError(f"{path}: cannot be created ({place} may not be written to).")
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be created ({error.strerror or error}).") from error
    return path


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.realpath(one) == os.path.realpath(other) or os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _left(command: str, outputs: list[Path], began: float) -> str:
    """What an interrupted command leaves behind, as the end of a sentence."""
    patterns = _RESUMED.get(command)
    for path in outputs:
        kept = path.is_file() or any(any(path.glob(pattern)) for pattern in patterns or ())
        if patterns is not None and kept:
            return f": what is finished is kept in {escape(str(path))}. Run the same command again to go on."
    # To a second: file systems keep times more coarsely than the clock.
    written = [file for path in outputs for file in _files(path) if file.stat().st_mtime > began - 1]
    if written:
        return f": written so far: {escape(', '.join(map(str, written)))}."
    return ": nothing was written." if outputs else "."


def _files(path: Path) -> list[Path]:
    """A file, or those of a folder."""
    return sorted(file for file in [path, *path.glob("*")] if file.is_file())
