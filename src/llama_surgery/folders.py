"""Whose a file or folder is: nothing is written over what belongs to a model or to another library."""

import json
import os
import stat
from pathlib import Path

from llama_surgery.errors import AdapterError, SurgeryError

#: Files of an adapter. PEFT's have the same names.
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
#: What the description of an adapter of this package has as its type, and a tensor that each of them holds.
FORMAT = "llama-surgery"
FINGERPRINT = "fingerprint"
MODEL_CONFIG = "config.json"

#: Names that results never have, and models, tokenizers and adapters do.
_TAKEN = (
    *("config.json", "generation_config.json", "adapter_config.json", "model_index.json", "modules.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "params.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "preprocessor_config.json", "processor_config.json"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".onnx", ".h5")
#: Adapters in the formats of other libraries.
_OTHER_ADAPTERS = ("adapter_model.bin", "pytorch_adapter.bin")


def check_folder(folder: Path) -> Path:
    """``folder``, if nothing in it belongs to somebody else, as an earlier adapter of ours does not.

    Raises:
        SurgeryError: It is a file, cannot be looked into, or holds a model or an adapter of another library.
    """
    try:
        if not os.path.lexists(folder):
            return folder
        if not folder.is_dir():
            raise SurgeryError(f"{folder} is a file or a broken link: give a folder to write to.")
        found = _foreign(folder)
    except OSError as error:
        raise SurgeryError(f"{folder}: cannot be read ({error.strerror or error}).") from error
    if found is not None:
        raise SurgeryError(
            f"{folder} holds {found}, which would be lost or no longer load. Nothing was written: give a "
            "folder of its own."
        )
    return folder


def check_file(path: Path, *, own: bool = False) -> Path:
    """Where writing to ``path`` ends up: itself, or what it points at as a symbolic link.

    Raises:
        SurgeryError: A folder, a device or a pipe has this name; or, unless it is our ``own``, a file that
            belongs to a model or an adapter has it, or would seem to.
        OSError: It cannot be looked at.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not own and target.name in _TAKEN and _foreign(target.parent) is not None:
            raise SurgeryError(f"{path} would be taken for a part of the model there: {_ANOTHER}") from None
        return target
    if stat.S_ISDIR(mode):
        raise SurgeryError(f"could not write {path}: it is a folder. Give the name of a file to write.")
    if not stat.S_ISREG(mode):
        raise SurgeryError(f"could not write {path}: it is a device or a pipe. {_ANOTHER}")
    if not own and (target.name in _TAKEN or target.suffix in _WEIGHTS):
        raise SurgeryError(f"{path} is a file of a model or an adapter: it is not replaced. {_ANOTHER}")
    return target


_ANOTHER = "Give the name of another file to write."


def check_complete(folder: Path) -> Path:
    """``folder``, if the files of an adapter are in it and their description is one of this package.

    Raises:
        AdapterError: One is missing, or of somebody else.
    """
    absent = [name for name in (CONFIG_FILE, TENSOR_FILE) if not os.path.exists(folder / name)]
    if absent:
        lacking = f"{folder} is a file" if os.path.isfile(folder) else f"{folder / absent[0]} is missing"
        raise AdapterError(
            f"{lacking}: an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}, "
            "as 'llama-surgery operate' and save_adapter write it. Adapters are not looked for on the Hub."
        )
    try:
        described = _described(folder)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror or error}).") from error
    if described == "":
        raise AdapterError(f"the adapter in {folder} is damaged: {CONFIG_FILE} is not JSON. Save it again.")
    if described != FORMAT:
        raise AdapterError(f"{folder / CONFIG_FILE} does not describe a {FORMAT} adapter.")
    return folder


def is_own_adapter(folder: Path) -> bool:
    """Whether the description of an adapter in ``folder`` is one of this package, and can be read."""
    try:
        return _described(folder) == FORMAT
    except OSError:
        return False


def _foreign(folder: Path) -> str | None:
    """What in ``folder`` belongs to somebody else, in words; None where nothing does. May raise OSError."""
    if (folder / MODEL_CONFIG).exists():
        return f"a model ({MODEL_CONFIG})"
    described, tensors = _described(folder), folder / TENSOR_FILE
    own = tensors.exists() and FINGERPRINT in _tensor_names(tensors)
    # One of ours whose description is damaged may be saved again, as is one that was not finished.
    if described is not None and described != FORMAT and not (described == "" and own):
        return f"an adapter of another library ({CONFIG_FILE})"
    damaged = described == FORMAT and tensors.exists() and not _tensor_names(tensors)
    if tensors.exists() and not own and not damaged:
        return f"tensors of another library ({TENSOR_FILE})"
    others = [name for name in _OTHER_ADAPTERS if (folder / name).exists()]
    return f"an adapter of another library ({others[0]})" if others else None


def _described(folder: Path) -> str | None:
    """The type in an adapter's description: None where there is no description, "" where it names none."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return ""
    return str(content.get("peft_type") or "other") if isinstance(content, dict) else "other"


def _tensor_names(file: Path) -> frozenset[str]:
    """Names of the tensors in a file; none where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return frozenset(tensors.keys())
    except SafetensorError:
        return frozenset()
