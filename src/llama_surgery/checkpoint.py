"""Where a model is: in a folder, in the cache of the Hub, or on the Hub, which is not waited for in vain."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
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
        The name, and further arguments: for a GGUF file its folder and its name.

    Raises:
        SurgeryError: There is no such folder or file, and no such model in the cache, and the name is none of
            the Hub's or the Hub does not answer; or the folder is an adapter, or has one among the model's
            files; or a package that reads GGUF files is missing.
    """
    name = os.fspath(given)
    if is_gguf(Path(name)):
        return _in_gguf(Path(name))
    if name and os.path.exists(name):
        _check_folder(Path(name))
        return name, {}
    lost = f"could not load {name!r}: there is no such folder or file"
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


def without_weights(given: str | Path, **more: Any) -> Any:
    """A model in a folder, a ``config.json``, a GGUF file or on the Hub, its parameters on the meta device.

    ``more`` is what transformers' ``from_config`` takes besides.

    Raises:
        SurgeryError: There is no configuration, or no model can be made of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, options = located(given)
    try:
        described = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(described, **more)
    except Exception as error:  # what a library makes of a file that may hold anything
        raise SurgeryError(
            f"{given}: no model configuration that can be read ({told(error)}). Give the folder of a "
            "checkpoint, its config.json, a GGUF file, or its name on the Hub."
        ) from error


def loaded(name: str, options: dict[str, Any], dtype: Any, **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model and tokenizer of what :func:`located` found, and what transformers has to say of loading them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _read_once(options):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **_unpacked(options), **more
        )
    return model, tokenizer, found


def unpack(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a checkpoint of bfloat16 into ``folder``.

    Raises:
        SurgeryError: A package that reads the file is missing, or the file is damaged.
    """
    import torch

    name, options = _in_gguf(file)
    try:
        model, tokenizer, _ = loaded(name, options, torch.bfloat16)
    except Exception as error:  # the same
        raise SurgeryError(f"could not load {file}: {told(error)}.") from error
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpacked(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`located` for a model: weights of GGUF files become plain ones."""
    if "gguf_file" not in options:
        return options
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases unpack them in any case
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _read_once(options: dict[str, Any]) -> Iterator[None]:
    """While a model of :func:`located` is loaded, the head of a GGUF file is read once.

    transformers reads it for the configuration, the tokenizer and the weights, and makes the table of tensor
    names anew for every module: three quarters of a minute for a model of 135 million weights.
    """
    if "gguf_file" not in options:
        yield
        return
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in plain.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(_GGUF)) == _GGUF
    except OSError:
        return False


def _in_gguf(file: Path) -> tuple[str, dict[str, Any]]:
    """As :func:`located`; raises SurgeryError where a package that reads the file is missing."""
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


def _check_folder(folder: Path) -> None:
    """Refuses folders without a model, or with an adapter of ours, which transformers would stumble over."""
    if not folder.is_dir():
        return
    if not is_own_adapter(folder):
        if not (folder / MODEL_CONFIG).exists():
            raise SurgeryError(f"{folder}: no {MODEL_CONFIG} is in this folder. {_HOW}")
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
