"""Where a model is: in a folder, in the cache of the Hub, or on the Hub, which is not waited for in vain."""

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_surgery.errors import SurgeryError
from llama_surgery.folders import CONFIG_FILE, FORMAT, MODEL_CONFIG, TENSOR_FILE, is_own_adapter

#: Seconds for the Hub to answer at all, unless HF_HUB_ETAG_TIMEOUT gives others. transformers would ask again
#: and again, for a minute.
PATIENCE = 5.0
#: Names with such an ending are files, not names on the Hub.
_FILES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".txt")
_HOW = (
    "Give the folder of a Hugging Face checkpoint (config.json, safetensors, tokenizer), a GGUF file, or a "
    "name on the Hub with its owner, as in 'meta-llama/Llama-3.1-8B'."
)
#: What GGUF files begin with.
_GGUF = b"GGUF"


def located(given: str | Path) -> tuple[str, dict[str, Any]]:
    """What to hand to transformers' ``from_pretrained`` for a folder, a file or a name on the Hub.

    The network is asked for nothing that looks like a path, and not at all with ``HF_HUB_OFFLINE``. Without
    one, models in the cache are found there.

    Returns:
        The name, and further arguments: for a GGUF file its folder and its name (:func:`unpacked` adds what a
        model needs).

    Raises:
        SurgeryError: There is no such folder and no such model in the cache, and the name is none of the
            Hub's or the Hub does not answer; or the folder is an adapter, or has one among the model's files;
            or a package that reads GGUF files is missing.
    """
    name = os.fspath(given)
    if _is_gguf(Path(name)):
        return _in_gguf(Path(name))
    if name and os.path.exists(name):
        _check_adapter(Path(name))
        return name, {}
    lost = f"could not load {name!r}: there is no such folder"
    if not _may_be_on_hub(name):
        raise SurgeryError(f"{lost}. {_HOW}")
    from huggingface_hub import constants

    cached = _cached(name)
    if "/" not in name and not cached:  # a folder's name, misspelt, far more often than a model's
        raise SurgeryError(f"{lost}, and names on the Hub have an owner. {_HOW}")
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set and the model is not in the cache"
    elif _answers(constants.ENDPOINT):
        return name, {}
    else:
        reason = f"{constants.ENDPOINT} does not answer and the model is not in the cache"
    if not cached:
        raise SurgeryError(f"{lost}, {reason}. {_HOW}")
    return name, {"local_files_only": True}


def unpacked(options: dict[str, Any]) -> dict[str, Any]:
    """What :func:`located` returns beside the name, for a model: weights of GGUF files become plain ones."""
    if "gguf_file" not in options:
        return options
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases unpack them in any case
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(_GGUF)) == _GGUF
    except OSError:
        return False


def _in_gguf(file: Path) -> tuple[str, dict[str, Any]]:
    """
    Raises:
        SurgeryError: A package that transformers reads it with is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise SurgeryError(
            f"{file} is a GGUF file, and {' and '.join(missing)} is missing to read it: pip install "
            f"{' '.join(missing)}."
        )
    return str(file.parent), {"gguf_file": file.name}


def told(error: Exception) -> str:
    """What a library says about a checkpoint that it cannot load, to the end of the first full line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    known = first and isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
    return (first if known else f"{type(error).__name__}: {first}").rstrip(" .:")


def _check_adapter(folder: Path) -> None:
    """
    Raises:
        SurgeryError: The folder holds an adapter of this package, which transformers would stumble over.
    """
    if not folder.is_dir() or not is_own_adapter(folder):
        return
    if not (folder / MODEL_CONFIG).exists():
        raise SurgeryError(
            f"{folder} is an adapter, not a model: give the model's folder, and this one as the adapter."
        )
    if find_spec("peft") is not None:
        raise SurgeryError(
            f"{folder} holds an adapter of {FORMAT} among the files of the model, which transformers takes "
            f"for one of PEFT: move {CONFIG_FILE} and {TENSOR_FILE} to a folder of their own."
        )


def _may_be_on_hub(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(_FILES)


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in (MODEL_CONFIG, CONFIG_FILE))


def _answers(address: str) -> bool:
    """Whether a server answers anything. In a thread: looking up its name knows no time limit."""
    from huggingface_hub import get_session

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    found, over = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            get_session().head(address, timeout=seconds)
            found.set()
        except Exception:  # whatever a proxy or a library makes of it: there is no answer
            pass
        over.set()

    threading.Thread(target=ask, daemon=True).start()
    over.wait(seconds)
    return found.is_set()
