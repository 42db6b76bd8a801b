"""Writing an operated model as an ordinary checkpoint folder that a serving engine loads."""

import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llama_surgery.checkpoint import is_gguf, located, told, unpack
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.files import write_atomically, write_json
from llama_surgery.folders import CONFIG_FILE, TENSOR_FILE, is_own_adapter
from llama_surgery.serving.families import (
    BLOCK,
    BLOCK_VERSION,
    ROUTER_TENSOR,
    check_servable,
    exported_architecture,
)
from llama_surgery.topology.router import PageRouter

ROUTER_FILE = "router.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Weights in other formats: left behind, the engine and transformers read the safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
#: A second copy of the model in Mistral's own layout. Where the engine finds one it never looks at
#: ``config.json``, and would serve the dense model.
_SECOND_COPY = ("params.json", "consolidated*")
#: Of an adapter of this package among the model's files: the engine would take its tensors for weights.
_OWN_ADAPTER = (CONFIG_FILE, TENSOR_FILE)


def export(model: str | Path, out: str | Path, adapter: str | Path | None = None) -> SurgeryConfig:
    """Write the dense checkpoint ``model``, operated as ``adapter`` says, to the folder ``out``.

    The safetensors are copied byte for byte; weights in other formats are left out. ``config.json`` gets an
    architecture name of its own and the operation; transformers' ``from_pretrained`` still opens the folder
    as the dense model. The folder appears whole or not at all.

    Args:
        model: Folder of a Hugging Face checkpoint in safetensors, or a GGUF file (written as bfloat16).
        out: Folder to write; absent or empty.
        adapter: Folder of an adapter; the default topology, not calibrated, if None.

    Returns:
        The configuration written.

    Raises:
        UnsupportedModelError: The model cannot be operated or is of a family that is not served.
        SurgeryError: A folder is missing, damaged or in the way, or the disk is full.
    """
    model, out = Path(model), Path(os.path.realpath(out))
    if is_gguf(model):
        with tempfile.TemporaryDirectory() as folder:
            unpack(model, Path(folder))
            return export(folder, out, adapter)
    description = _read_config(model)
    architecture = exported_architecture(description, str(model))
    if (model / CONFIG_FILE).exists() and not is_own_adapter(model):
        raise SurgeryError(
            f"{model} holds an adapter of another library ({CONFIG_FILE}), which the engine would not apply: "
            "merge it into the weights first, or remove it."
        )
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise SurgeryError(f"{out} cannot be read ({error.strerror}): give another folder.") from error
    if taken:
        raise SurgeryError(f"{out} is there already: give a folder that does not exist or is empty.")
    config, routers = _operation(model, adapter)
    check_servable(config)
    block = {
        "version": BLOCK_VERSION,
        "config": config.to_dict(),
        "routers": {str(layer): sorted(router.tensors()) for layer, router in routers.items()},
    }
    written = {**description, "architectures": [architecture], BLOCK: block}
    # It names the dense model's code, which the engine would fall back on where it knows no architecture.
    written.pop("auto_map", None)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for file in sorted(model.iterdir()):
            if file.is_file() and file.name != "config.json" and not _left_behind(file):
                shutil.copyfile(file, temporary / file.name)
        _write_routers(temporary, routers)
        write_json(temporary / "config.json", written, own=True)
        os.replace(temporary, out)
    except OSError as error:
        raise SurgeryError(
            f"could not write {out}: {error.strerror or error}. Nothing was left behind; check the disk and "
            "the permissions."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def _left_behind(file: Path) -> bool:
    return (
        file.suffix in _OTHER_WEIGHTS
        or file.name in _OWN_ADAPTER  # others are refused
        or any(map(file.match, _SECOND_COPY))
    )


def _read_config(model: Path) -> dict[str, Any]:
    try:
        description = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(
            f"{model / 'config.json'}: {error.strerror}. Give the folder of a Hugging Face checkpoint."
        ) from error
    except ValueError as error:
        raise SurgeryError(f"{model / 'config.json'} is damaged: {error}.") from error
    if not isinstance(description, dict):
        raise SurgeryError(f"{model / 'config.json'} is damaged: it does not describe a model.")
    if all(_left_behind(file) for file in model.glob("*.safetensors")):
        raise SurgeryError(
            f"{model} holds no safetensors: save it with model.save_pretrained() of a recent transformers."
        )
    return description


def _operation(model: Path, adapter: str | Path | None) -> tuple[SurgeryConfig, dict[int, PageRouter]]:
    """Configuration and learned corrections, checked against the model itself."""
    from transformers import AutoModelForCausalLM

    from llama_surgery.surgery.adapter import load_adapter
    from llama_surgery.surgery.operate import operate
    from llama_surgery.surgery.operation import config_of, routers_of, surgery_of

    located(model)
    try:
        dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    except Exception as error:  # what a library makes of files that may hold anything
        raise SurgeryError(f"could not load {model}: {told(error)}.") from error
    operated = operate(dense) if adapter is None else load_adapter(dense, adapter)
    layers = dense.config.num_hidden_layers
    if len(surgery_of(operated)) != layers:
        raise UnsupportedModelError(
            f"{len(surgery_of(operated))} of {layers} layers have full attention: models with sliding-window "
            "layers are not served yet."
        )
    return config_of(operated), routers_of(operated)


def _write_routers(folder: Path, routers: dict[int, PageRouter]) -> None:
    tensors = {
        ROUTER_TENSOR.format(layer=layer, part=part): tensor.detach().to("cpu", torch.float32).contiguous()
        for layer, router in routers.items()
        for part, tensor in router.tensors().items()
    }
    if not tensors:
        return
    write_atomically(folder / ROUTER_FILE, lambda file: file.write_bytes(save(tensors)), own=True)
    index = folder / INDEX_FILE
    if index.exists():  # where there is an index, engines read nothing that it does not list
        listed = json.loads(index.read_text(encoding="utf-8"))
        listed["weight_map"] |= dict.fromkeys(tensors, ROUTER_FILE)
        write_json(index, listed, own=True)
