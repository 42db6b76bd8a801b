"""An operation that a model carries, and what may be asked of it."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from llama_surgery.attention.executor import check_config
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.surgery.layer import ATTRIBUTE
from llama_surgery.surgery.replace import Replacement
from llama_surgery.surgery.statistics import Statistics, summarise
from llama_surgery.surgery.supported import head_shape, inner_model

#: Modules of topologies that stand on this room: what :func:`room_of` loads.
_ROOMS = {"gumbel": "llama_surgery.gumbel.room"}


def room_of(config: SurgeryConfig) -> Any:
    """What executes a topology other than ``pages``; None for that one.

    A module with ``layers(inner, modules, config, routers)``, what the modules are to carry;
    ``cache(text, indices)``, an empty cache; ``hook``, the modules' pre-forward hook; and
    ``routers(inner, config, tensors)``, what an adapter kept of the layers.
    """
    name = _ROOMS.get(config.topology)
    return None if name is None else importlib.import_module(name)


@dataclasses.dataclass(frozen=True)
class MeasuredLoss:
    """What an operated model lost, and read, on the text that its thresholds were set on for a loss.

    Attributes:
        max_loss: What was asked for: perplexity over that of the dense model, less one, at most.
        loss: What was measured.
        low: Lower end of its two-sided 95% interval.
        high: Upper end, which is within ``max_loss``.
        windows: Windows of text.
        length: Tokens of a window.
        far_density: Executed far pairs over causal pairs there.
        total_density: The same with near field and summaries.
    """

    max_loss: float
    loss: float
    low: float
    high: float
    windows: int
    length: int
    far_density: float
    total_density: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int | float):
                raise TypeError(f"{name}={value!r}: a measured loss is made of numbers.")

    def __str__(self) -> str:
        return (
            f"perplexity {self.loss:+.2%} (95% interval {self.low:+.2%} to {self.high:+.2%}; limit "
            f"{self.max_loss:+.2%}) on {self.windows} windows of {self.length:,} tokens, at a far density of "
            f"{self.far_density:.2%} and a total density of {self.total_density:.2%}"
        )


@dataclasses.dataclass
class Operation:
    """What has to be undone, and where the operated layers are; and what was measured of it, if anything."""

    config: SurgeryConfig
    modules: dict[int, torch.nn.Module]
    replacement: Replacement
    measured: MeasuredLoss | None = None
    _replaced: list[tuple[torch.nn.Module, str, dict[str, Any]]] = dataclasses.field(default_factory=list)

    def put(self, part: torch.nn.Module, name: str, method: Any) -> None:
        """Replace a method of one model, not of its class."""
        self._replaced.append((part, name, {name: part.__dict__[name]} if name in part.__dict__ else {}))
        part.__dict__[name] = method

    def undo(self) -> None:
        """Take out hooks and methods."""
        self.replacement.undo()
        for part, name, before in reversed(self._replaced):
            part.__dict__.pop(name, None)
            part.__dict__.update(before)

    def use(self, config: SurgeryConfig) -> None:
        """Have all layers run with a configuration."""
        self.config = config
        for layer in self.layers.values():
            layer.config = config

    @property
    def layers(self) -> dict[int, Any]:
        return {index: module.__dict__[ATTRIBUTE] for index, module in self.modules.items()}

    def cache(self) -> DynamicCache:
        """An empty cache."""
        text = self.replacement.text
        # generate(assistant_early_exit=n) runs the first n layers: the configuration then counts only those.
        count = getattr(text, "num_hidden_layers", len(self.modules))
        indices = [index for index in self.modules if index < count]
        if (room := room_of(self.config)) is not None:
            return room.cache(text, indices)
        return PagedCache(text, self.config, indices)


def operation_of(model: torch.nn.Module) -> Operation:
    operation = inner_model(model).__dict__.get(ATTRIBUTE)
    if operation is None:
        raise SurgeryError("the model is not operated: call operate(model) first.")
    return operation


def is_operated(model: torch.nn.Module) -> bool:
    return ATTRIBUTE in inner_model(model).__dict__


def config_of(model: torch.nn.Module) -> SurgeryConfig:
    """The configuration an operated model runs with."""
    return operation_of(model).config


def set_config(model: torch.nn.Module, config: SurgeryConfig) -> None:
    """Change the configuration of an operated model. Caches made before do not fit it.

    Raises:
        SurgeryError: Another topology, or other trees: operate anew. Or a backend that cannot run it.
    """
    operation = operation_of(model)
    old, new = (_trees(each) for each in (operation.config, config))
    if old != new:
        raise SurgeryError(f"the model is operated with {old}, not {new}: eject(model) and operate again.")
    check_executable(inner_model(model), operation.modules, config)
    if config != operation.config:
        operation.measured = None
    operation.use(config)


def check_executable(
    inner: PreTrainedModel, modules: Mapping[int, torch.nn.Module], config: SurgeryConfig
) -> None:
    """Raise SurgeryError where a backend asked for by name cannot run the modules with a configuration."""
    for module in modules.values():
        check_config(config, head_shape(inner, module)[2])


def _trees(config: SurgeryConfig) -> tuple[Any, ...]:
    """What an operated model cannot change: the topology, and what content routers are made for."""
    gumbel = config.gumbel
    return (config.topology,) if gumbel is None else (config.topology, gumbel.arities, gumbel.length)


def surgery_of(model: torch.nn.Module) -> dict[int, Any]:
    """What the operated layers carry, by layer index: a ``LayerSurgery``, or what :func:`room_of` says."""
    return operation_of(model).layers


def measured_loss(model: torch.nn.Module) -> MeasuredLoss | None:
    """What an operated model loses at its thresholds, where :func:`operate`, or an adapter, set them for a
    loss."""
    return operation_of(model).measured


def statistics(model: torch.nn.Module) -> Statistics:
    """What the operated layers read since :func:`operate` or :func:`reset_statistics`."""
    operation = operation_of(model)
    counters = {index: layer.counters for index, layer in operation.layers.items()}
    return summarise(counters, operation.config.page_size)


def reset_statistics(model: torch.nn.Module) -> None:
    for layer in operation_of(model).layers.values():
        layer.counters.clear()


def paged_cache(model: torch.nn.Module) -> DynamicCache:
    """An empty cache for an operated model, as ``generate()`` and ``forward()`` build by themselves."""
    return operation_of(model).cache()


def routers_of(model: torch.nn.Module) -> dict[int, Any]:
    """Learned corrections, or content routers, of an operated model, by layer index."""
    return {index: layer.router for index, layer in surgery_of(model).items() if layer.router is not None}
