"""Runs README's ten lines with the package as it is installed, on a short text that takes seconds.

python -P tests/package/readme.py
"""

import contextlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Set before transformers is imported: the demo model needs no network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import llama_surgery

ROOT = Path(__file__).resolve().parents[2]

#: Of the text: more than 4,096 tokens, up to which prompts are dense on a CPU.
CHARACTERS = 20_000


def ten_lines() -> str:
    """The code under README's heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"## Ten lines of use.*?```python\n(.*?)```", text, re.DOTALL)
    assert found, "README.md has no Python code under 'Ten lines of use'"
    return found[1]


def main() -> None:
    installed = Path(llama_surgery.__file__)
    assert "site-packages" in installed.parts, f"{installed} is not an installed package"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("demo/text").mkdir(parents=True)
        Path("demo/books-26m").symlink_to(ROOT / "demo" / "books-26m")
        whole = (ROOT / "demo" / "text" / "calibration.txt").read_text(encoding="utf-8")
        Path("demo/text/calibration.txt").write_text(whole[:CHARACTERS], encoding="utf-8")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ten_lines(), "README.md", "exec"), {})
        text, density = printed.getvalue().rstrip().rsplit("\n", 1)
        assert text.strip()
        assert 0 < float(density) < 1
        assert sorted(path.name for path in Path("adapter").iterdir())
    command = Path(sys.executable).with_name("llama-surgery")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert importlib.metadata.version("llama-surgery") in shown, shown


if __name__ == "__main__":
    main()
