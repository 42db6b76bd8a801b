"""Forms of one model that are compared, each with its own way to keep a density."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.evaluation.generation import phases
from llama_surgery.evaluation.kept import found_parts, with_parts
from llama_surgery.evaluation.logits import read_windows
from llama_surgery.evaluation.peers.executor import running
from llama_surgery.evaluation.peers.registry import Learned, Peer
from llama_surgery.evaluation.peers.rule import Rule
from llama_surgery.surgery import operate as surgery
from llama_surgery.surgery.operation import routers_of
from llama_surgery.topology.router import PageRouter

#: Passes over the calibration windows that are spent on one density, and how near is near enough.
TRIES, NEAR = 6, 0.02

#: Densities by phase, ``prefill`` and ``decode``, complete when the form's context ends.
Densities = dict[str, float]


@dataclasses.dataclass
class Form:
    """The dense model as it is, and what every form of it can be asked.

    Attributes:
        name: In file names and options.
        title: In tables and figures.
        ahead: Whether a row of a prompt may see keys that later rows chose.
    """

    name: str = "dense"
    title: str = "dense"
    ahead: bool = False

    def floor(self) -> float:
        """Smallest total density that the form can have, measured on calibration text."""
        return 1.0

    def setting(self, density: float) -> dict[str, Any]:
        """What gives nearly this total density, from :meth:`floor` to 1, on calibration text."""
        return {}

    @contextlib.contextmanager
    def running(self, setting: dict[str, Any]) -> Iterator[Densities]:
        """Have the model follow the form within a ``with`` block; what it read is known at the end."""
        yield {"prefill": 1.0, "decode": 1.0}


class PeerForm(Form):
    """A peer's rule.

    Args:
        name: Key of :data:`~llama_surgery.evaluation.peers.registry.PEERS`.
        peer: The rule.
        model: A dense model.
        ids: (windows, length) int64, calibration windows that densities are measured on.
        training: (windows, length) int64, calibration windows for rules that learn.
    """

    def __init__(
        self, name: str, peer: Peer, model: nn.Module, *, ids: torch.Tensor, training: torch.Tensor
    ) -> None:
        self.name, self.title, self.ahead = name, peer.title, peer.ahead
        self._peer, self._model, self._ids, self._training = peer, model, ids, training
        self._learned: Learned | None = None
        self._probes: dict[float, float] = {}

    def floor(self) -> float:
        return self._density(self._number(0.0))

    def setting(self, density: float) -> dict[str, Any]:
        x = solve(lambda x: self._density(self._number(x)), density)
        return {"knob": self._peer.knob, "number": self._number(x)}

    @contextlib.contextmanager
    def running(self, setting: dict[str, Any]) -> Iterator[Densities]:
        densities: Densities = {}
        with running(self._model, self._rule(setting["number"])) as count:
            yield densities
        densities.update(count.densities())

    def _number(self, x: float) -> float:
        return self._peer.number(x, self._ids.shape[1], self._tensors())

    def _rule(self, number: float) -> Rule:
        return self._peer.make(number, self._tensors())

    def _density(self, number: float) -> float:
        if number not in self._probes:
            with running(self._model, self._rule(number)) as count:
                read_windows(self._model, self._ids)
            self._probes[number] = count.densities()["prefill"]
        return self._probes[number]

    def _tensors(self) -> Learned:
        if self._learned is None:
            learn = self._peer.learn
            self._learned = {} if learn is None else learn(self._model, self._training)
        return self._learned


class PagesForm(Form):
    """This package's own topology.

    Args:
        name: In file names and options.
        config: The topology; thresholds, and budgets by head, are set for each density.
        model: A dense model.
        texts: Calibration text.
        ids: (windows, length) int64, calibration windows that the floor is measured on.
        routers: Learned corrections by layer index.
    """

    def __init__(
        self,
        name: str,
        config: SurgeryConfig,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        texts: Sequence[str],
        ids: torch.Tensor,
        routers: Mapping[int, PageRouter] | None = None,
    ) -> None:
        learned = "" if routers is None else ", learned"
        self.name, self.title = name, f"pages, tile {config.tile}{learned} (this package)"
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._routers = routers
        self._texts, self._ids = list(texts), ids
        self._measured: tuple[float, float] | None = None

    def floor(self) -> float:
        return self._floor()[0]

    def setting(self, density: float) -> dict[str, Any]:
        total, fixed = self._floor()
        # What is always open varies a little from text to text: just above it nothing can be aimed at.
        if density >= 1 or density - fixed < 1.1 * (total - fixed):
            # No share exceeds 1, nor does a threshold that calibration sets; and every share exceeds 0.
            return self._with_theta(0.0 if density >= 1 else 1.0).to_dict()
        with self._operated(
            self._config,
            density=density - fixed,
            decode_density=density - fixed,  # rules of others choose in decode steps too
            text=self._texts,
            tokenizer=self._tokenizer,
            length=self._ids.shape[1],
        ):
            found = surgery.config_of(self._model).to_dict()
            return {**found, "routers": found_parts(routers_of(self._model))}

    @contextlib.contextmanager
    def running(self, setting: dict[str, Any]) -> Iterator[Densities]:
        densities: Densities = {}
        config = SurgeryConfig.from_dict({name: setting[name] for name in setting if name != "routers"})
        routers = self._routers
        if "routers" in setting:
            routers = with_parts(routers, setting["routers"])
        with surgery.operated(self._model, config, routers=routers), phases(self._model) as found:
            yield densities
        densities.update((phase, read["total_density"]) for phase, read in found.items())

    def _floor(self) -> tuple[float, float]:
        """Total density at θ = 1, and without the far field.

        Nothing is opened then but the page of the first token, and what a head with a negative learned offset
        opens all the same.
        """
        if self._measured is None:
            with self._operated(self._with_theta(1.0)):
                read_windows(self._model, self._ids)
                read = surgery.statistics(self._model)
            self._measured = read.total_density, read.total_density - read.far_density
        return self._measured

    def _operated(
        self, config: SurgeryConfig, **arguments: Any
    ) -> contextlib.AbstractContextManager[nn.Module]:
        return surgery.operated(self._model, config, routers=self._routers, **arguments)

    def _with_theta(self, theta: float) -> SurgeryConfig:
        return dataclasses.replace(self._config, theta=theta, theta_decode=theta)


def solve(density: Callable[[float], float], target: float) -> float:
    """The budget x in 0…1 at which a rising ``density`` comes nearest to ``target``.

    ``density(1)`` is taken to be 1. Regula falsi on the logarithm; what was tried is kept by the caller.
    """
    tried = {0.0: density(0.0), 1.0: 1.0}

    def nearest() -> float:
        return min(tried, key=lambda x: abs(math.log(tried[x] / target)))

    for _ in range(TRIES):
        if abs(math.log(tried[nearest()] / target)) <= NEAR:
            break
        low = max((x for x in tried if tried[x] <= target), default=0.0)
        high = min((x for x in tried if x > low), default=1.0)
        part = math.log(target / tried[low]) / max(math.log(tried[high] / tried[low]), 1e-9)
        x = low + (high - low) * min(0.9, max(0.1, part))
        tried[x] = density(x)
    return nearest()


def densities_between(floor: float, requested: Sequence[float]) -> list[float]:
    """Total densities at which a form is measured: its floor, the requested ones above it, and between them
    further ones until there are five."""
    points = [floor, *sorted({t for t in requested if 1 > t > 1.03 * floor})]
    if len(points) == 1:
        points.append((1 + floor) / 2)
    while len(points) < 5:
        gaps = [b / a for a, b in itertools.pairwise(points)]
        widest = gaps.index(max(gaps))
        points.insert(widest + 1, math.sqrt(points[widest] * points[widest + 1]))
    return [round(point, 4) for point in points]
