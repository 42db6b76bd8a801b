"""Forms of one model that benchmarks/real.py compares: dense, operated, oracles."""

import bisect
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from real_results import canonical
from torch import nn
from transformers import PreTrainedTokenizerBase

import llama_surgery
from llama_surgery.config import FIELDS, SurgeryConfig
from llama_surgery.evaluation.compare import CALIBRATION_WINDOWS
from llama_surgery.evaluation.kept import adapter_digest, claimed, digest, found_parts, with_parts
from llama_surgery.evaluation.peers.executor import running as running_peer
from llama_surgery.evaluation.peers.maps import HeaviestBlocks
from llama_surgery.evaluation.peers.registry import PEERS
from llama_surgery.evaluation.perplexity import perplexity
from llama_surgery.files import write_json
from llama_surgery.surgery.calibrate import calibrate, calibration_windows
from llama_surgery.surgery.operation import config_of, reset_statistics, routers_of, statistics
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows
from llama_surgery.topology.router import PageRouter

#: The operated model: heads with budgets of their own, or one threshold for all.
OPERATED, ONE_THETA = "operated", "one-theta"
#: Oracles, and the peers that they are.
ORACLES = {"tokens": "token-oracle", "blocks": "block-oracle"}
DECODES = ("dense", "sparse")
ROUNDINGS = ("float32", "bfloat16", "float16", "eager", "sdpa")
#: Precision that goes without saying in the settings of a row.
DTYPE = "bfloat16"
_THETAS = ("theta", "theta_decode")
#: Of a θ: what it is measured with is then exactly what a row says.
_DIGITS = 4

#: What was read since the last call: ``far`` and ``total`` density, as far as the form knows them.
Read = Callable[[], dict[str, float]]


class Form(Protocol):
    """What is measured.

    Attributes:
        name: One of :data:`real_results.FORMS`.
        settings: What distinguishes it from others of the same name.
    """

    name: str
    settings: dict[str, Any]

    def running(self) -> contextlib.AbstractContextManager[Read]:
        """The model follows the form."""


def by_decode(config: SurgeryConfig) -> dict[str, SurgeryConfig]:
    """The configuration for every way to decode that it allows: ``dense`` and ``sparse``.

    Decode steps, and the rows that end a prompt, read everything where their θ is 0. With tiles of one query
    they have that of the prompt.
    """
    if config.tile == 1:
        return {"sparse" if config.theta else "dense": config}
    dense = {"dense": dataclasses.replace(config, theta_decode=0.0)}
    return {**dense, "sparse": config} if config.theta_decode else dense


def changes(config: SurgeryConfig) -> dict[str, Any]:
    """What a configuration has that the default has not, without θ."""
    found = {name: getattr(config, name) for name in FIELDS if name not in _THETAS}
    return {name: value for name, value in found.items() if value != getattr(SurgeryConfig(), name)}


@dataclasses.dataclass
class Dense:
    """The model as it is."""

    settings: dict[str, Any]
    name: str = "dense"

    @contextlib.contextmanager
    def running(self) -> Iterator[Read]:
        yield dict


@dataclasses.dataclass
class Rounding:
    """The dense model in another precision or with another implementation of attention."""

    model: nn.Module
    settings: dict[str, Any]
    name: str = "rounding"

    @contextlib.contextmanager
    def running(self) -> Iterator[Read]:
        inner = inner_model(self.model)
        attention = inner.config.get_text_config()._attn_implementation
        if "attention" in self.settings:
            inner.set_attn_implementation(self.settings["attention"])
            try:
                yield dict
            finally:
                inner.set_attn_implementation(attention)
            return
        # Parameters alone: models keep rotary tables in float32 whatever their precision.
        kept = {parameter: parameter.data for parameter in inner.parameters()}
        try:
            for parameter in kept:
                parameter.data = parameter.data.to(getattr(torch, self.settings["dtype"]))
            yield dict
        finally:
            for parameter, data in kept.items():
                parameter.data = data


@dataclasses.dataclass
class Operated:
    """The operated model."""

    model: nn.Module
    config: SurgeryConfig
    routers: Mapping[int, PageRouter] | None
    settings: dict[str, Any]
    name: str = "operated"

    @contextlib.contextmanager
    def running(self) -> Iterator[Read]:
        def read() -> dict[str, float]:
            found = statistics(self.model)
            reset_statistics(self.model)
            return {"far": found.far_density, "total": found.total_density}

        with llama_surgery.operated(self.model, self.config, routers=self.routers):
            yield read


@dataclasses.dataclass
class Oracle:
    """A rule that knows the true attention, at a budget."""

    model: nn.Module
    name: str
    count: int
    settings: dict[str, Any]

    @contextlib.contextmanager
    def running(self) -> Iterator[Read]:
        with running_peer(self.model, PEERS[ORACLES[self.name]].make(self.count, {})) as count:

            def read() -> dict[str, float]:
                total = count.densities()["prefill"]
                count.read.clear()
                count.causal.clear()
                return {"total": total}

            yield read


def budget(name: str, total: float, length: int) -> int:
    """The count of keys or blocks of a row with which an oracle comes nearest to a total density.

    What it reads is known beforehand: so many keys, or so many blocks with the row's own among them, or all.
    """
    rows = torch.arange(length)
    size = HeaviestBlocks.block if name == "blocks" else 1

    def density(count: int) -> float:
        read = rows % size + 1 + (rows // size).clamp(max=count - 1) * size
        return read.sum().item() / (rows + 1).sum().item()

    most = -(-length // size)
    over = min(most, 1 + bisect.bisect_left(range(1, most + 1), total, key=density))
    return min((max(1, over - 1), over), key=lambda count: abs(density(count) - total))


class Calibrated(NamedTuple):
    """The operated model, as one of its two names, and what it reads of calibration text in all."""

    name: str
    config: SurgeryConfig
    routers: dict[int, PageRouter]
    total: float


class Maker:
    """Makes forms; what calibration finds is kept in the study's folder, so that every run has the same.

    Args:
        model: A dense model.
        tokenizer: Its tokenizer.
        calibration: Documents that nothing is measured on.
        length: Tokens of a window.
        density: Executed far density that θ is calibrated to.
        config: The topology.
        given: Names of what was set by hand: a θ among them is not calibrated.
        routers: Learned corrections by layer index, or None.
        dtype: The model's precision.
        rounding: One of :data:`ROUNDINGS`.
        folder: Of the study.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Sequence[str],
        *,
        length: int,
        density: float,
        config: SurgeryConfig,
        given: Sequence[str],
        routers: Mapping[int, PageRouter] | None,
        dtype: str,
        rounding: str,
        folder: Path,
    ) -> None:
        self._model, self._tokenizer, self._texts = model, tokenizer, list(calibration)
        self._length, self._density, self._folder = length, density, folder
        free = not set(given) & set(_THETAS)  # then θ is set for this very length
        self._config = dataclasses.replace(config, theta_length=0) if free else config
        self._given, self._routers, self._free = given, routers, free
        self._rounding = rounding
        self._shared = {} if dtype == DTYPE else {"dtype": dtype}
        self._ids: torch.Tensor | None = None

    def make(self, name: str, decodes: Sequence[str] = DECODES) -> list[Form]:
        """The forms of a name: the operated model is one for each way to decode."""
        if name == "dense":
            return [Dense({**self._shared})]
        if name == "rounding":
            what = "attention" if self._rounding in ("eager", "sdpa") else "dtype"
            return [Rounding(self._model, {**self._shared, what: self._rounding})]
        found = self.calibrated(OPERATED if name in ORACLES else name)
        if name not in ORACLES:
            ways = by_decode(found.config)
            return [self._operated(found, decode) for decode in decodes if decode in ways]
        count = budget(name, found.total, self._length)
        return [Oracle(self._model, name, count, {**self._shared, PEERS[ORACLES[name]].knob: count})]

    def calibrated(self, name: str) -> Calibrated:
        """The operated model, with its θ, and the total density that it has on calibration text."""

        def measure() -> dict[str, Any]:
            given = (self._model, self._tokenizer, self._texts, self._length)
            free, asked = self._free, dict[str, Any]()
            if free and name == OPERATED:
                asked = {"density": self._density, "decode_density": self._density}
                asked |= dict(zip(("tokenizer", "text", "length"), given[1:], strict=True))
            with llama_surgery.operated(self._model, self._config, routers=self._routers, **asked):
                config = config_of(self._model)
                if free and not asked:
                    ids = calibration_windows(*given, config)
                    config = calibrate(self._model, ids, self._density, decode_density=self._density)
                parts = found_parts(routers_of(self._model))
            thetas = {theta: float(f"{getattr(config, theta):.{_DIGITS}g}") for theta in _THETAS}
            config = dataclasses.replace(self._config, **thetas)
            routers = with_parts(self._routers, parts)
            with Operated(self._model, config, routers, {}).running() as read:
                perplexity(self._model, self._windows())
                return {**thetas, **read(), "routers": parts}

        study = {"form": name, "calibrated_on": digest(*self._texts)}
        found = self._found(canonical({**study, **self._described()}), measure)
        config = dataclasses.replace(self._config, **{theta: found[theta] for theta in _THETAS})
        return Calibrated(name, config, with_parts(self._routers, found["routers"]), found["total"])

    def _described(self) -> dict[str, Any]:
        """What calibration depends on, beside model, length and text."""
        by_hand = {name: getattr(self._config, name) for name in _THETAS if name in self._given}
        described = {**self._shared, **changes(self._config), **(by_hand or {"density": self._density})}
        if self._routers:
            described["adapter"] = adapter_digest(SurgeryConfig(), self._routers)
            names = {name for router in self._routers.values() for name in router.tensors()}
            if learned := sorted(names - {"key_weight", "offset"}):  # metric and budgets need no learning
                described["learned"] = learned
        return described

    def _operated(self, found: Calibrated, decode: str) -> Operated:
        config = by_decode(found.config)[decode]
        settings = {name: value for name, value in self._described().items() if name != "density"}
        settings |= {"theta": config.theta, "decode": decode}
        budgets = {i: r.offset.tolist() for i, r in found.routers.items() if r.offset is not None}
        if budgets and all(router.offset is None for router in (self._routers or {}).values()):
            settings["budgets"] = digest(canonical(budgets))
        if decode == "sparse":
            settings["theta_decode"] = config.theta_decode
        else:
            settings.pop("theta_decode", None)
        return Operated(self._model, config, found.routers, settings, found.name)

    def _windows(self) -> torch.Tensor:
        """Calibration windows that densities are measured on."""
        if self._ids is None:
            self._ids = windows(self._tokenizer, self._texts, self._length, CALIBRATION_WINDOWS, seed=0)
        return self._ids

    def _found(self, key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an earlier run found, or another process that is at it; else what ``find`` finds."""
        file = self._folder / "calibrated.json"
        with claimed(self._folder, "calibrated", wait=True):
            known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if key not in known:
                known[key] = find()
                write_json(file, known)
        return known[key]
