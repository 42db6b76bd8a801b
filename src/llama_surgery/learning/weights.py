"""A model whose weights stay on disk: every part is loaded when it computes and dropped after it."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from llama_surgery.checkpoint import is_gguf, without_weights
from llama_surgery.errors import SurgeryError, UnsupportedModelError

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


class Weights:
    """The tensors of a checkpoint folder, read one at a time.

    Args:
        folder: With ``config.json`` and safetensors files.

    Raises:
        SurgeryError: The folder holds no safetensors checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if is_gguf(self.folder):
            raise SurgeryError(
                f"{folder} is a GGUF file, and streaming reads safetensors: leave out --stream, or give the "
                "folder of the same model in safetensors."
            )
        index = self.folder / INDEX_FILE
        try:
            if index.exists():
                self.files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            else:
                with safe_open(self.folder / SINGLE_FILE, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), SINGLE_FILE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise SurgeryError(
                f"{self.folder}: no safetensors checkpoint that can be read ({error}). Streaming needs the "
                "folder of one, with config.json."
            ) from error

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some tensors, on the CPU, as the checkpoint holds them; every file is opened once.

        Raises:
            UnsupportedModelError: The checkpoint does not hold one under its name.
            SurgeryError: A file is missing or damaged.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise UnsupportedModelError(
                    f"{self.folder} holds no tensor {name!r}: checkpoints that are converted while they are "
                    "loaded cannot be streamed."
                )
            by_file.setdefault(self.files[name], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            with self._opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors

    def digest(self) -> str:
        """Short fingerprint of the checkpoint: names, shapes and the middle row of all its tensors.

        Raises:
            SurgeryError: A file is missing or damaged.
        """
        found = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            with self._opened(path) as file:
                for name in sorted(file.keys()):
                    tensor = file.get_slice(name)
                    shape = tensor.get_shape()
                    found.update(f"{name} {shape}".encode())
                    if shape:
                        row = tensor[shape[0] // 2 : shape[0] // 2 + 1]
                        found.update(row.float().numpy().tobytes())
        return found.hexdigest()[:16]

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{self.folder / path} cannot be read ({error}).") from error


def skeleton(folder: str | Path) -> PreTrainedModel:
    """The model of a checkpoint folder with all its parameters on the meta device, in evaluation mode.

    Raises:
        SurgeryError: There is no configuration.
        UnsupportedModelError: It computes with buffers that are neither in the checkpoint nor rotary tables.
    """
    model = without_weights(folder)
    for name, module in model.named_modules():
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if not hasattr(module, "inv_freq"):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) keeps buffers that are not rotary tables: the model "
                "cannot be streamed."
            )
        # Rotary tables are no weights: they are made from the configuration.
        model.set_submodule(name, type(module)(config=module.config))
    return model.eval()


def parts_of(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The parts of the decoder that are loaded as a whole, by name: its layers, and its other children."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    parts: list[torch.nn.Module] = []
    for child in decoder.children():
        parts += list(child) if isinstance(child, torch.nn.ModuleList) else [child]
    return {names[id(part)]: part for part in parts}


@contextlib.contextmanager
def loaded(
    module: torch.nn.Module, name: str, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """``module``'s parameters from the checkpoint for the length of a ``with`` block; then meta again."""
    load(module, name, weights, device, dtype)
    try:
        yield
    finally:
        drop(module)


def load(
    module: torch.nn.Module, name: str, weights: Weights, device: torch.device, dtype: torch.dtype
) -> None:
    """Load the parameters of ``module``, called ``name`` in the checkpoint, without gradient.

    Raises:
        UnsupportedModelError: The checkpoint does not hold them, or in another shape.
    """
    tensors = weights.read(f"{name}.{key}" for key, _ in module.named_parameters())
    for key, _ in list(module.named_parameters()):
        *path, leaf = key.split(".")
        tensor = tensors.pop(f"{name}.{key}").to(device, dtype)
        owner = module.get_submodule(".".join(path))
        wanted = owner._parameters[leaf].shape
        if tensor.shape != wanted:
            raise UnsupportedModelError(
                f"{weights.folder}: {name}.{key} is {tuple(tensor.shape)}; config.json says {tuple(wanted)}."
            )
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def drop(module: torch.nn.Module) -> None:
    """Put the parameters of ``module`` back onto the meta device."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextlib.contextmanager
def streamed(
    model: PreTrainedModel, weights: Weights, device: torch.device, dtype: torch.dtype
) -> Iterator[PreTrainedModel]:
    """Let a skeleton's decoder compute for the length of a ``with`` block, one part in memory at a time."""
    handles = []
    for name, part in parts_of(model).items():

        def before(module: torch.nn.Module, args: tuple, name: str = name) -> None:
            load(module, name, weights, device, dtype)

        def after(module: torch.nn.Module, args: tuple, output: object) -> None:
            drop(module)

        if not any(True for _ in part.parameters()):
            part.to(device)
        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
