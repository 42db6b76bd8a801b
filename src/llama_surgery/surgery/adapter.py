"""Saving and loading an operation: a small folder in the shape adapters usually have."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import AdapterError, SurgeryError, UnsupportedModelError, check_version
from llama_surgery.files import as_json, write_json, write_together
from llama_surgery.folders import CONFIG_FILE, FINGERPRINT, FORMAT, TENSOR_FILE, check_complete, check_folder
from llama_surgery.surgery.operate import operate
from llama_surgery.surgery.operation import (
    MeasuredLoss,
    config_of,
    measured_loss,
    operation_of,
    room_of,
    routers_of,
)
from llama_surgery.surgery.supported import attention_modules, inner_model
from llama_surgery.topology.router import PageRouter

Model = TypeVar("Model", bound=torch.nn.Module)

FORMAT_VERSION = 2
ROUTER = "router"
MEASURED = "measured_loss"
_SAMPLES = 64
_PLAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Write the operation of ``model`` to ``folder``: configuration, learned corrections, what it loses if
    that was measured, and a fingerprint of the model.

    Files are written atomically, the configuration last: a folder without it is no adapter. An earlier
    adapter of this package in ``folder`` is replaced; the names of the files are PEFT's.

    Raises:
        SurgeryError: The model is not operated, the folder holds a model or an adapter of another library, or
            cannot be written.
    """
    write_adapter(folder, model, config_of(model), routers_of(model), measured_loss(model))


def write_adapter(
    folder: str | Path,
    model: torch.nn.Module,
    config: SurgeryConfig,
    routers: Mapping[int, Any],
    measured: MeasuredLoss | None = None,
) -> None:
    """Write an adapter of ``model``, which need not be operated, nor in memory but for its first attention.

    Raises:
        SurgeryError: The folder holds a model or an adapter of another library, or cannot be written.
    """
    folder = check_folder(Path(folder))
    tensors = {FINGERPRINT: _fingerprint(model)}
    for index, router in routers.items():
        for name, part in router.tensors().items():
            tensors[f"{ROUTER}.{index}.{name}"] = part.detach().float().cpu().contiguous()
    description = {
        "peft_type": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": _describe(model),
        "surgery": config.to_dict(),
    }
    if measured is not None:
        description[MEASURED] = dataclasses.asdict(measured)
    files = {
        # As bytes: the library's own writing does not raise OSError where the disk is full.
        folder / TENSOR_FILE: lambda file: file.write_bytes(save(tensors)),
        folder / CONFIG_FILE: as_json(description),
    }
    write_together(files, own=True)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Operate on ``model`` as a saved adapter says.

    Raises:
        AdapterError: The folder is missing, damaged, newer than this release or of another model.
        UnsupportedModelError: The model cannot be operated.
    """
    folder = Path(folder)
    description, tensors = _read(folder)
    expected, got = description["base_model"], _describe(model)
    differing = sorted(k for k in got if expected.get(k) != got[k])
    if differing:
        told = ", ".join(f"{k}: adapter {expected.get(k)!r}, model {got[k]!r}" for k in differing)
        raise AdapterError(f"the adapter in {folder} is of another model ({told}).")
    want, have = tensors[FINGERPRINT].float(), _fingerprint(model)
    # Half-precision roundings of one checkpoint agree to 1%; other weights do not.
    known = want.numel() and have.numel()
    if known and (want.shape != have.shape or not torch.allclose(want, have, rtol=1e-2, atol=1e-4)):
        raise AdapterError(
            f"the adapter in {folder} was made for a model of this shape with other weights: its "
            "thresholds do not fit. Calibrate on this model instead."
        )
    config, measured = _operation(folder, description)
    routers = _routers(folder, tensors, config, model)
    try:
        operate(model, config, routers=routers)
    except UnsupportedModelError:
        raise
    except SurgeryError as error:
        raise AdapterError(f"the adapter in {folder} cannot be used: {error}") from error
    operation_of(model).measured = measured
    return model


def read_config(folder: Path) -> tuple[SurgeryConfig, MeasuredLoss | None]:
    """The topology of a saved adapter, and what the model loses with it if that was measured.

    Raises:
        AdapterError: The folder is missing, damaged or newer than this release.
    """
    return _operation(folder, _read(folder)[0])


def write_config(folder: Path, config: SurgeryConfig) -> None:
    """Give a saved adapter another topology.

    Raises:
        AdapterError: The folder is missing, damaged or newer than this release.
        SurgeryError: It cannot be written.
    """
    write_json(folder / CONFIG_FILE, {**_read(folder)[0], "surgery": config.to_dict()}, own=True)


def _operation(folder: Path, description: dict[str, Any]) -> tuple[SurgeryConfig, MeasuredLoss | None]:
    """Topology and measured loss in the description of an adapter."""
    try:
        given = description.get(MEASURED)
        measured = None if given is None else MeasuredLoss(**given)
        return SurgeryConfig.from_dict(description["surgery"]), measured
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error


def _routers(
    folder: Path, tensors: dict[str, torch.Tensor], config: SurgeryConfig, model: torch.nn.Module
) -> dict[int, Any]:
    """Learned corrections, or content routers, by layer index, from tensors ``router.<layer>.<part>``."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for name, tensor in tensors.items():
            if name.startswith(f"{ROUTER}."):
                _, index, part = name.split(".", 2)
                parts.setdefault(int(index), {})[part] = tensor
        if (room := room_of(config)) is not None:
            return room.routers(inner_model(model), config, parts)
        return {index: PageRouter(**values) for index, values in parts.items()}
    except (ValueError, TypeError) as error:
        raise AdapterError(
            f"the adapter in {folder} holds learned corrections that this release does not know ({error}). "
            "Update llama-surgery."
        ) from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    check_complete(folder)
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSOR_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise AdapterError(f"the adapter in {folder} is damaged: {error}. Save it again.") from error
    what, version = f"the adapter in {folder} has format version", description.get("format_version")
    check_version(what, version, FORMAT_VERSION, AdapterError)
    missing = {"base_model", "surgery"} - description.keys() | {FINGERPRINT} - tensors.keys()
    if missing or not isinstance(description["base_model"], dict):
        missing = missing or {"a description of the base model"}
        raise AdapterError(
            f"the adapter in {folder} is damaged: {', '.join(sorted(missing))} missing. Save it again."
        )
    return description, tensors


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    inner = inner_model(model)
    text = inner.config.get_text_config()
    heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", heads),
        "operated_layers": sorted(attention_modules(inner)),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Short fingerprint of a model's weights as they are loaded: evenly spaced ones of every parameter.

    A checkpoint that was trained on has another, under whatever name and in whatever folder it lies; so has
    the same one in another dtype.
    """
    found = hashlib.sha256()
    for name, weight in inner_model(model).named_parameters():
        found.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.numel() and not weight.is_meta:
            found.update(_sampled(weight).numpy().tobytes())
    return found.hexdigest()[:16]


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    return flat[index.to(flat.device)].float().cpu()


def _fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """Evenly spaced weights of the first operated layer; empty where they cannot be read."""
    module = next(iter(attention_modules(inner_model(model)).values()))
    for name, weight in module.named_parameters():
        readable = weight.dtype in _PLAIN and not weight.is_meta  # numbers of FP8 are scaled elsewhere
        if weight.dim() == 2 and readable and "lora" not in name:
            return _sampled(weight)
    return torch.empty(0)
