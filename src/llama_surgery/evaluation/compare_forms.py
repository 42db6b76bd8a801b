"""Forms of one model that are compared, each with its own way to keep a density."""

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.config import SurgeryConfig
from llama_surgery.evaluation.generation import phases
from llama_surgery.evaluation.intervals import mean_interval, paired_difference, perplexity_ratio
from llama_surgery.evaluation.kept import found_parts, with_parts
from llama_surgery.evaluation.logits import read_windows
from llama_surgery.evaluation.needle import NeedlePrompt
from llama_surgery.evaluation.peers.executor import running
from llama_surgery.evaluation.peers.registry import Learned, Peer
from llama_surgery.surgery import operation
from llama_surgery.surgery.operate import operated
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


@dataclasses.dataclass(kw_only=True)
class PeerForm(Form):
    """A peer's rule.

    Attributes:
        model: A dense model.
        ids: (windows, length) int64, calibration windows that densities are measured on.
        training: (windows, length) int64, calibration windows for rules that learn.
        probes: Density at each value of the knob that was tried.
    """

    peer: Peer
    model: nn.Module
    ids: torch.Tensor
    training: torch.Tensor
    probes: dict[float, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def learned(self) -> Learned:
        """What the rule learns of calibration text."""
        return {} if self.peer.learn is None else self.peer.learn(self.model, self.training)

    def floor(self) -> float:
        return self._density(self._number(0.0))

    def setting(self, density: float) -> dict[str, Any]:
        x = solve(lambda x: self._density(self._number(x)), density)
        return {"knob": self.peer.knob, "number": self._number(x)}

    @contextlib.contextmanager
    def running(self, setting: dict[str, Any]) -> Iterator[Densities]:
        densities: Densities = {}
        with running(self.model, self.peer.make(setting["number"], self.learned)) as count:
            yield densities
        densities.update(count.densities())

    def _number(self, x: float) -> float:
        return self.peer.number(x, self.ids.shape[1], self.learned)

    def _density(self, number: float) -> float:
        if number not in self.probes:
            with self.running({"number": number}) as densities:
                read_windows(self.model, self.ids)
            self.probes[number] = densities["prefill"]
        return self.probes[number]


@dataclasses.dataclass(kw_only=True)
class PagesForm(Form):
    """This package's own topology.

    Attributes:
        config: The topology; thresholds, and budgets by head, are set for each density.
        routers: Learned corrections by layer index.
        model: A dense model.
        texts: Calibration text.
        ids: (windows, length) int64, calibration windows that the floor is measured on.
    """

    config: SurgeryConfig
    routers: Mapping[int, PageRouter] | None
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    ids: torch.Tensor

    def floor(self) -> float:
        return self.least[0]

    @functools.cached_property
    def least(self) -> tuple[float, float]:
        """Total density at θ = 1, and without the far field.

        Hardly anything is opened then but the page of the first token, and what a head with a negative
        learned offset opens all the same.
        """
        with operated(self.model, self._with_theta(1.0), routers=self.routers):
            read_windows(self.model, self.ids)
            read = operation.statistics(self.model)
        return read.total_density, read.total_density - read.far_density

    def setting(self, density: float) -> dict[str, Any]:
        total, fixed = self.least
        # What is always open varies a little from text to text: just above it nothing can be aimed at.
        if density >= 1 or density - fixed < 1.1 * (total - fixed):
            # Every share exceeds 0, and few exceed 1.
            return self._with_theta(0.0 if density >= 1 else 1.0).to_dict()
        # Rules of others choose in decode steps too.
        far = {"density": density - fixed, "decode_density": density - fixed, "length": self.ids.shape[1]}
        given = {"routers": self.routers, "text": list(self.texts), "tokenizer": self.tokenizer, **far}
        with operated(self.model, self.config, **given):
            found = operation.config_of(self.model).to_dict()
            return {**found, "routers": found_parts(routers_of(self.model))}

    @contextlib.contextmanager
    def running(self, setting: dict[str, Any]) -> Iterator[Densities]:
        densities: Densities = {}
        values, routers = dict(setting), self.routers
        if "routers" in values:
            routers = with_parts(routers, values.pop("routers"))
        config = SurgeryConfig.from_dict(values)
        with operated(self.model, config, routers=routers), phases(self.model) as found:
            yield densities
        densities.update((phase, read["total_density"]) for phase, read in found.items())

    def _with_theta(self, theta: float) -> SurgeryConfig:
        return dataclasses.replace(self.config, theta=theta, theta_decode=theta)


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


#: Settings that every row repeats, so that a CSV stands alone.
_SHARED = (
    *("model", "length", "windows", "needles", "seed", "dtype", "tf32"),
    *("llama_surgery", "torch", "transformers"),
)


def row(
    form: Form,
    floor: float,
    target: float,
    cell: Mapping[str, Any],
    dense: Mapping[str, Any],
    prompts: Sequence[NeedlePrompt],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """One form at one density.

    Densities are measured on what was asked, summaries of unseen pages included: ``total_density`` over the
    perplexity windows, ``prefill_density`` and ``decode_density`` while the needles were answered.
    ``needle`` is over all prompts, ``needle_kept`` over those that the dense model answered, each with
    Wilson's 95% interval; ``needle_bound`` is the one-sided 95% lower bound of the paired difference to
    dense, in closed form, and ``needle_changed`` counts prompts that one of both answered alone.
    """
    setting, answers = cell["setting"], cell["answers"]
    ratio = perplexity_ratio(dense["per_window"], cell["per_window"])
    paired = paired_difference(dense["answers"], answers)
    kept = [float(after) for before, after in zip(dense["answers"], answers, strict=True) if before]
    variants = dict.fromkeys(prompt.variant for prompt in prompts)
    return {
        "form": form.name,
        "title": form.title,
        "ahead": form.ahead,
        "floor": floor,
        "target_density": target,
        "total_density": cell["density"],
        "knob": setting.get("knob", "theta" if "theta" in setting else ""),
        "number": setting.get("number", setting.get("theta")),
        "perplexity": _perplexity(cell),
        "dense_perplexity": _perplexity(dense),
        "perplexity_ratio": ratio.ratio,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        **_named("needle", mean_interval(answers)),
        **_named("needle_kept", mean_interval(kept) if kept else (None, None, None)),
        "dense_needle": paired.dense,
        "needle_difference": paired.difference,
        "needle_bound": paired.low,
        "needle_changed": paired.lost + paired.won,
        **{f"{phase}_density": value for phase, value in cell["answering"].items()},
        **{
            f"needle_{name}": statistics.fmean(
                right for right, prompt in zip(answers, prompts, strict=True) if prompt.variant == name
            )
            for name in variants
        },
        "seconds": cell["seconds"],
        "device": cell["device"],
        **{name: settings[name] for name in _SHARED},
    }


def _perplexity(cell: Mapping[str, Any]) -> float:
    return math.exp(statistics.fmean(cell["per_window"]))


def _named(name: str, interval: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
