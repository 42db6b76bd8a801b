"""A real model and its configuration, as benchmarks/real.py and real_speed.py take them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.cli.common import Dtype, load_model, topology_of
from llama_surgery.config import FIELDS, SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter


class RealModel(NamedTuple):
    """A dense model, and what it is to be operated with.

    Attributes:
        name: As rows of a table have it.
        model: Dense.
        tokenizer: Its tokenizer.
        config: The topology.
        by_hand: Fields of ``config`` that were given by hand.
        routers: Learned corrections by layer index, or None.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: SurgeryConfig
    by_hand: dict[str, Any]
    routers: dict[int, PageRouter] | None


def real_model(
    path: str, device: str, dtype: str, adapter: Path | None, fields: Sequence[str] = ()
) -> RealModel:
    """Loads a model.

    Args:
        path: Folder of a checkpoint, or a GGUF file.
        device: As ``llama-surgery`` takes it.
        dtype: Of its weights.
        adapter: Folder of learned corrections, whose configuration is taken; None for the defaults.
        fields: ``NAME=VALUE`` for fields of SurgeryConfig.

    Raises:
        SurgeryError: There is no such model, adapter or field.
    """
    by_hand = dict(map(_field, fields))
    unknown = sorted(set(by_hand) - set(FIELDS))
    if unknown:
        raise SurgeryError(f"--set {', '.join(unknown)}: fields of SurgeryConfig are {', '.join(FIELDS)}.")
    model, tokenizer = load_model(path, device, Dtype(dtype), adapter=adapter)
    config, routers = topology_of(model, adapter)
    config = dataclasses.replace(config, **by_hand)
    return RealModel(name_of(path), model, tokenizer, config, by_hand, routers)


def name_of(path: str) -> str:
    """What a model is called in rows."""
    return Path(path).resolve().name if Path(path).exists() else path


def study_folder(out: Path, model: str, length: int, text: Path) -> Path:
    """Where all is kept that is found of a model, at a length, on a text."""
    return out / f"{model.replace('/', '--')}-{length}-{text_name(text)}"


def text_name(text: Path) -> str:
    """What a text is called in rows."""
    return text.name if text.is_dir() else text.stem


def _field(given: str) -> tuple[str, Any]:
    name, _, value = given.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
