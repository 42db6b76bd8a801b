"""The package as a whole: what importing it costs, and what is installed with it."""

import importlib.metadata
import subprocess
import sys
from importlib.resources import files

import pytest

import llama_surgery

TOPOLOGY_ROOM = """
import importlib, pkgutil, llama_surgery.topology as room
for module in pkgutil.walk_packages(room.__path__, "llama_surgery.topology."):
    importlib.import_module(module.name)
"""


def loaded_by(code: str, suspects: tuple[str, ...]) -> list[str]:
    """Return which of the top-level modules ``suspects`` are loaded once ``code`` has run.

    A fresh interpreter is asked, because this one has long imported most of them.
    """
    code += f"\nimport sys; print(*[m for m in {suspects!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(
    ("code", "suspects"),
    [
        pytest.param("import llama_surgery", ("triton", "matplotlib", "vllm"), id="package"),
        # Every public name at once; transformers itself loads triton where it is installed.
        pytest.param("from llama_surgery import *", ("matplotlib", "vllm"), id="names"),
        pytest.param(TOPOLOGY_ROOM, ("triton", "transformers"), id="topology"),
    ],
)
def test_import_leaves_heavy_modules_unloaded(code: str, suspects: tuple[str, ...]) -> None:
    assert loaded_by(code, suspects) == []


def test_loaded_by_sees_an_import() -> None:
    assert loaded_by("import json.tool", ("json", "triton")) == ["json"]


def test_package_is_marked_as_typed() -> None:
    assert files("llama_surgery").joinpath("py.typed").is_file()


def test_version_is_the_one_installed() -> None:
    assert llama_surgery.__version__ == importlib.metadata.version("llama-surgery")
