"""What an evaluation found, ready for JSON, CSV and reports."""

import dataclasses
from typing import TYPE_CHECKING, Any

from llama_surgery.evaluation.intervals import Change, RatioInterval

if TYPE_CHECKING:
    from llama_surgery.evaluation.needle import NeedlePrompt

#: Name of the dense model among the measured ones.
DENSE = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model, dense or operated.

    Attributes:
        name: ``dense``, or the name its configuration was given.
        perplexity: Over all tokens of all windows.
        by_position: Perplexity in bins of positions: ``from``, ``to``, ``tokens``, ``perplexity``.
        seconds_per_window: Median wall time of one forward pass over a window, without the logits.
        needle_accuracy, needle_seconds: Share answered, and wall time of all; None without needles.
    """

    name: str
    perplexity: float
    by_position: list[dict[str, Any]]
    seconds_per_window: float
    needle_accuracy: float | None
    needle_seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatedMeasurement(Measurement):
    """An operated model, and how it compares with the dense one on the same windows and prompts.

    Attributes:
        config: The configuration, as ``SurgeryConfig.to_dict()``.
        ratio: Perplexity over that of the dense model.
        kl: Mean KL(dense ‖ operated), nats per token.
        top1: Share of positions where both rank the same token first.
        divergence_by_position: Both in bins of predicted positions: ``from``, ``to``, ``kl``, ``top1``.
        density: ``Statistics.to_dict()`` over the windows.
        needle: Paired with the dense model's answers, or None where none were asked.
        generate_density: Densities of ``prefill`` and ``decode`` while the needles were answered.
    """

    config: dict[str, Any]
    ratio: RatioInterval
    kl: float
    top1: float
    divergence_by_position: list[dict[str, Any]]
    density: dict[str, Any]
    needle: Change | None
    generate_density: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """A dense model and its operated forms, measured in one run.

    Attributes:
        length: Tokens of each of the perplexity ``windows``.
        seed: Of windows and prompts.
        environment: Versions, device, precision, threads.
        operated: In the order they were given.
        needles: The prompts.
        answers: For every measured model, whether it answered each prompt.
    """

    model: str
    length: int
    windows: int
    seed: int
    environment: dict[str, Any]
    dense: Measurement
    operated: list[OperatedMeasurement]
    needles: "list[NeedlePrompt]"
    answers: dict[str, list[bool]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, ready for JSON. Prompts come without their tokens."""
        properties = ("variant", "kind", "form", "depth", "length", "name")
        needles = [
            {
                **{name: getattr(prompt, name) for name in properties},
                "right": {name: rights[index] for name, rights in self.answers.items()},
            }
            for index, prompt in enumerate(self.needles)
        ]
        return {
            **self._shared,
            "environment": dict(self.environment),
            "dense": dataclasses.asdict(self.dense),
            "operated": [dataclasses.asdict(measured) for measured in self.operated],
            "needles": needles,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a measured model, the dense one first; what does not apply is left out."""
        shared = {**self._shared, "needles": len(self.needles)}
        return [{**shared, **_flat(one), **self.environment} for one in [self.dense, *self.operated]]

    @property
    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "length", "windows", "seed")}


_DENSITIES = (
    *("total_density", "far_density", "near_density", "summary_density", "visible_far_density"),
    "pages_read",
)


def _flat(measured: Measurement) -> dict[str, Any]:
    names = ("name", "perplexity", "needle_accuracy", "seconds_per_window", "needle_seconds")
    row = {name: getattr(measured, name) for name in names}
    if not isinstance(measured, OperatedMeasurement):
        return row | {"total_density": 1.0}
    ratio, needle = measured.ratio, measured.needle
    row |= {"perplexity_ratio": ratio.ratio, "ratio_low": ratio.low, "ratio_high": ratio.high}
    row |= {"kl": measured.kl, "top1": measured.top1}
    row |= {name: measured.density[name] for name in _DENSITIES}
    if needle is not None:
        row |= {"needle_difference": needle.difference, "needle_bound": needle.low}
    for phase, densities in measured.generate_density.items():
        row |= {f"{phase}_{name}": densities[name] for name in ("total_density", "far_density")}
    return row | {key: value for key, value in measured.config.items() if key != "version"}
