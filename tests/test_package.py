"""The package as a whole: what importing it costs, and what is installed with it."""

import subprocess
import sys
from importlib.resources import files

import pytest


def loaded_by(module: str, suspects: tuple[str, ...]) -> list[str]:
    """Return which of the top-level modules ``suspects`` are loaded once ``module`` is imported.

    A fresh interpreter is asked, because this one has long imported most of them.
    """
    code = f"import sys, {module}; print(*[m for m in {suspects!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(
    ("module", "suspects"),
    [
        ("llama_surgery", ("triton", "matplotlib", "vllm")),
        ("llama_surgery.topology", ("triton", "transformers")),
    ],
)
def test_import_leaves_heavy_modules_unloaded(module: str, suspects: tuple[str, ...]) -> None:
    assert loaded_by(module, suspects) == []


def test_loaded_by_sees_an_import() -> None:
    assert loaded_by("json.tool", ("json", "triton")) == ["json"]


def test_package_is_marked_as_typed() -> None:
    assert files("llama_surgery").joinpath("py.typed").is_file()
