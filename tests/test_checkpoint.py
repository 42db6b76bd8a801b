"""Where a model is looked for, and when the network is asked."""

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from llama_surgery import checkpoint
from llama_surgery.checkpoint import located
from llama_surgery.errors import SurgeryError
from llama_surgery.learning.weights import skeleton


class Touched(AssertionError):
    """The network was asked."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, online as far as settings go."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing may be asked; what was is listed."""
    asked: list[str] = []

    def ask(*arguments: Any, **_: Any) -> None:
        asked.append(str(arguments[0]))
        raise Touched

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", ask)
    monkeypatch.setattr(checkpoint, "_answers", ask)
    return asked


def keep(cache: Path, name: str, model: Path) -> None:
    """Put a model into a cache as the Hub's client does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


@pytest.mark.parametrize(
    "name",
    [
        "some-misspelt-folder",
        "./some/folder",
        "../model",
        "/no/such/folder",
        "~/model",
        "a/b/c",
        "models/",
        "models/config.json",
        "models/model.safetensors",
        "C:\\models\\llama",
        "",
        " ",
        "two words/model",
    ],
)
@pytest.mark.parametrize("find", [located, skeleton])
def test_what_looks_like_a_folder_never_touches_the_network(
    name: str, find: Any, cache: Path, network: list[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(SurgeryError, match=r"no such folder.*with its owner, as in 'meta-llama/"):
        find(name)
    assert not network and time.monotonic() - began < 2


def test_a_name_on_the_hub_is_asked_for_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_answers", lambda address: True)
    assert located("meta-llama/Llama-3.1-8B") == ("meta-llama/Llama-3.1-8B", {})
    monkeypatch.setattr(checkpoint, "_answers", lambda address: False)
    with pytest.raises(
        SurgeryError, match=r"no such folder or file, https://\S+ does not answer and .* not in the cache"
    ):
        located("meta-llama/Llama-3.1-8B")


def test_offline_nothing_is_asked(cache: Path, network: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SurgeryError, match="HF_HUB_OFFLINE is set and the model is not in the cache"):
        located("owner/name")
    assert not network


@pytest.mark.parametrize("name", ["someone/books", "books"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_model_in_the_cache_is_found_without_a_network(
    name: str, offline: bool, cache: Path, demo_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(cache, name, demo_model_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(checkpoint, "_answers", lambda address: False)
    found, options = located(name)
    assert AutoConfig.from_pretrained(found, **options).hidden_size
    assert skeleton(name).config.hidden_size


def test_a_folder_is_taken_before_a_name_on_the_hub(
    tmp_path: Path, cache: Path, network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError, match=r"owner/name: no config.json is in this folder"):
        located("owner/name")
    for folder in (tmp_path / "owner", tmp_path / "owner" / "name"):
        (folder / "config.json").touch()
    assert located("owner/name") == ("owner/name", {})
    assert located(Path("owner")) == ("owner", {})
    assert not network


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        assert not checkpoint._answers(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 2
    assert not checkpoint._answers("http://127.0.0.1:9")  # nobody listens


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_a_configuration_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(SurgeryError, match="no model configuration that can be read"):
        skeleton(tmp_path)
