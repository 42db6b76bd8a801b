"""What all commands share: loading a model."""

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_surgery.cli.console import escape, status
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.folders import check_complete

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Dtype(enum.StrEnum):
    """Precision of weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def load_model(
    path: str, device: str, dtype: Dtype, *, adapter: Path | None = None, longest: int | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a checkpoint and its tokenizer, in evaluation mode.

    Args:
        path: Folder of the checkpoint, a GGUF file (its weights become plain ones), or a name on the Hub.
        adapter: Folder of an adapter that will be asked for: missed before a model is loaded for it.
        longest: Tokens of the longest text that was asked for.

    Raises:
        SurgeryError: There is none at ``path`` or a part of it is missing, the device cannot be used, or the
            model cannot read so far.
        AdapterError: There is no adapter.
    """
    from llama_surgery.checkpoint import loaded

    if adapter is not None:
        check_complete(adapter)
    name, options = look_for(path)
    with status("Loading PyTorch and transformers …"):
        import torch
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    target, placed = _device("auto" if device == "split" else device), {}
    if device == "split":
        if find_spec("accelerate") is None:
            raise SurgeryError("device 'split' needs accelerate: pip install accelerate.")
        placed = {"device_map": "auto"}
    # What a GGUF file holds is no precision to compute in.
    wanted = precision(dtype, target, torch.bfloat16 if "gguf_file" in options else "auto")
    with status(f"Loading {escape(path)} …"), _loading(path):
        model, tokenizer, found = loaded(name, options, wanted, **placed)
        if "gguf_file" in options:
            model.config._name_or_path = path  # transformers keeps the folder's
        model = (model if placed else model.to(target)).eval()
    if lost := sorted(found["missing_keys"]):
        raise SurgeryError(
            f"{path} holds no values for {len(lost)} of the model's parameters, such as {lost[0]}: they "
            "would be random. Give a complete checkpoint of a causal language model."
        )
    if longest is not None:
        from llama_surgery.surgery.context import check_length

        check_length(model, longest)
    return model, tokenizer


def look_for(path: str) -> tuple[str, dict[str, Any]]:
    """:func:`llama_surgery.checkpoint.located`, told of: better known before PyTorch is loaded than after."""
    from llama_surgery.checkpoint import located

    with status(f"Looking for {escape(path)} …"):
        return located(path)


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; raises SurgeryError where there is none at ``path``."""
    from transformers import AutoTokenizer

    from llama_surgery.checkpoint import located

    name, options = located(path)
    with _loading(path):
        return AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Says in one line what a library makes of files that may hold anything."""
    from llama_surgery.checkpoint import told

    try:
        yield
    except Exception as error:
        raise SurgeryError(
            f"could not load {path!r}: {told(error)}. Give the folder of a Hugging Face checkpoint "
            "(config.json, safetensors, tokenizer), a GGUF file, or its name on the Hub."
        ) from error


def topology_of(model: Any, adapter: Path | None) -> tuple[SurgeryConfig, dict[int, Any] | None]:
    """Configuration and learned corrections of an adapter, checked against the model, which stays dense.

    Without an adapter the documented defaults, and None: operate() finds what goes with them.

    Raises:
        SurgeryError: The adapter does not fit, or the model cannot be operated.
    """
    if adapter is None:
        return SurgeryConfig(), None
    from llama_surgery.surgery.adapter import load_adapter
    from llama_surgery.surgery.operate import eject
    from llama_surgery.surgery.operation import config_of, routers_of

    load_adapter(model, adapter)
    config, routers = config_of(model), routers_of(model)
    eject(model)
    return config, routers


def precision(dtype: Dtype, device: "torch.device", held: Any) -> Any:
    """PyTorch's dtype of an option; 'auto' is float32 on a CPU, else what the checkpoint is ``held`` in."""
    import torch

    if dtype is not Dtype.auto:
        return getattr(torch, dtype.value)
    return torch.float32 if device.type == "cpu" else held


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise SurgeryError("device 'meta' holds no values: use 'cpu', or 'auto' to take a GPU.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SurgeryError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}). Use 'cpu', or 'auto' "
            "to take a GPU if there is one."
        ) from error
    return device
