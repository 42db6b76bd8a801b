"""What all tests share: threads, markers, hypothesis profiles, the demo model's folder."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Set before transformers is imported: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run under its interpreter, asked for before anything imports them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.interpreter import quicken

    quicken()

ROOT = Path(__file__).resolve().parent.parent

# One thread unless asked otherwise: results do not depend on the machine's number of cores, and
# the processes of pytest-xdist do not take each other's cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# The same examples in every run, and no deadline: the first call of a torch operator is slow.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


#: Marks of tests that have a target of their own in the Makefile.
APART = ("sweep", "compile")


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark in APART:
        parser.addoption(f"--{mark}", action="store_true", help=f"run the tests marked {mark} too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of ``APART`` unless asked for; skip ``gpu`` ones where there is no CUDA device."""
    for mark in APART:
        if not config.getoption(f"--{mark}"):
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


class _Deprecations(logging.Handler):
    """Collects the deprecations that transformers logs instead of warning about."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def _no_logged_deprecations() -> Iterator[None]:
    """Fail a test during which transformers logged that a call is deprecated."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not handler.messages, "transformers logged a deprecation:\n" + "\n".join(handler.messages)


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """Folder of the demo model: a Hugging Face checkpoint with its tokenizer."""
    return ROOT / "demo" / "books-26m"


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A config.json of a model that takes no time, for commands that need no weights."""
    values = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 60,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
