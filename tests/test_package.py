"""The package as a whole: what importing it costs, and what is installed with it."""

import importlib.metadata
import subprocess
import sys
from importlib.resources import files

import llama_surgery

TOPOLOGY_ROOM = """
import importlib, pkgutil, llama_surgery.topology as room
for module in pkgutil.walk_packages(room.__path__, "llama_surgery.topology."):
    importlib.import_module(module.name)
"""


def test_importing_leaves_heavy_modules_unloaded() -> None:
    """A fresh interpreter is asked, because this one has long imported most of them."""
    suspects = ("matplotlib", "vllm", "triton", "transformers")
    parts = (
        ("import json.tool", ("json", "triton"), ["json"]),  # what is asked sees an import
        ("import llama_surgery", suspects[:3], []),
        (TOPOLOGY_ROOM, suspects[2:], []),
        # Every public name at once; transformers itself loads triton where it is installed.
        ("from llama_surgery import *", suspects[:2], []),
    )
    code = "import sys\n" + "\n".join(
        f"{part}\nprint(*[m for m in {asked!r} if m in sys.modules])" for part, asked, _ in parts
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [line.split() for line in run.stdout.splitlines()] == [found for *_, found in parts]


def test_package_is_marked_as_typed() -> None:
    assert files("llama_surgery").joinpath("py.typed").is_file()


def test_version_is_the_one_installed() -> None:
    assert llama_surgery.__version__ == importlib.metadata.version("llama-surgery")
