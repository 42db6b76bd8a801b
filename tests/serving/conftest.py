"""The demo model in transformers, its exported folders, a server, and the summary that the tests end with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.harness import DENSE_LIMIT, SPARSE, Reference, Server, exported
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_surgery.text import encode

SUMMARY = pytest.StashKey[list[str]]()

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What each acceptance point compared, and what came of it."""
    lines = config.stash.get(SUMMARY, [])
    if lines:
        terminalreporter.section("serving: what was compared")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> list[str]:
    """Lines of the summary, to be added to."""
    return request.config.stash.setdefault(SUMMARY, [])


@pytest.fixture(scope="session")
def reference(demo_model_path: Path, summary: list[str]) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32).eval()
    text = (demo_model_path.parent / "text" / "evaluation.txt").read_text(encoding="utf-8")
    return Reference(model, encode(AutoTokenizer.from_pretrained(demo_model_path), text), summary)


@pytest.fixture(scope="session")
def sparse_folder(reference: Reference, demo_model_path: Path, tmp_path_factory: Any) -> Path:
    return exported(reference.model, demo_model_path, tmp_path_factory.mktemp("sparse"), SPARSE)


@pytest.fixture(scope="session")
def dense_limit_folder(reference: Reference, demo_model_path: Path, tmp_path_factory: Any) -> Path:
    return exported(reference.model, demo_model_path, tmp_path_factory.mktemp("theta0"), DENSE_LIMIT)


@pytest.fixture(scope="module")
def server(sparse_folder: Path, tmp_path_factory: Any, summary: list[str]) -> Iterator[Server]:
    """The operated demo model, far density 0.06; chunked prefill (512) and prefix caching are on."""
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    server = Server(sparse_folder, folder / "log.txt", "--chat-template", str(template)).start()
    try:
        yield server
    finally:
        server.kill()
        told = [line for line in server.text().splitlines() if "far density" in line]
        busiest = max(told, key=lambda line: int(line.split("pages read ")[1].split(",")[0]), default="")
        summary.append(f"of {len(told)} lines in the engine's log: {busiest.partition('] ')[2]}")
