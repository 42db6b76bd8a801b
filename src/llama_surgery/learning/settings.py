"""How a topology is learned: settings and the course of the homotopy."""

import dataclasses
import math
from typing import Any, get_args

from llama_surgery.errors import SurgeryError
from llama_surgery.learning.corrections import Part
from llama_surgery.learning.gates import Homotopy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """What is learned, and how.

    Attributes:
        density: Executed far pairs over causal pairs to end at.
        length: Tokens of a training window, a multiple of the tile.
        steps: Optimiser steps, each on one window (one for every process, if there are several).
        parts: What is learned beside budgets; see :data:`~llama_surgery.learning.corrections.Part`.
        rate: Learning rate of budgets and scores, in nats a step at most; the key map's is a third of it.
        seed: Of windows, sampled tiles and starting values.
        sampled_tiles: Tiles of each block that are looked at where the model stays on disk.

    Raises:
        SurgeryError: A value is out of range.
    """

    density: float
    length: int = 8192
    steps: int = 200
    parts: tuple[Part, ...] = ("channels",)
    rate: float = 0.03
    seed: int = 0
    sampled_tiles: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if isinstance(self.density, str) or not 0 < self.density < 1:
            raise SurgeryError(f"density={self.density!r}: must lie between 0 and 1.")
        for name in ("length", "steps", "sampled_tiles"):
            if getattr(self, name) < 1:
                raise SurgeryError(f"{name}={getattr(self, name)}: must be at least 1.")
        if not 0 < self.rate < 1:
            raise SurgeryError(f"rate={self.rate}: must lie between 0 and 1.")
        bad = sorted(set(self.parts) - set(get_args(Part)))
        if bad:
            raise SurgeryError(f"parts={self.parts}: allowed are {', '.join(get_args(Part))}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


#: Shares of the steps: λ rises to 1 until the first, τ falls from the first to the second.
RISE, HARDENED = 0.1, 0.8
#: τ until the gates begin to harden, and at the end.
FIRST_TEMPERATURE, LAST_TEMPERATURE = 0.5, 0.1


def homotopy_at(step: int, settings: LearningSettings) -> Homotopy:
    """λ and τ of a step: λ rises from 0 to 1, then τ falls geometrically to its end."""
    done = step / settings.steps
    strength = min(1.0, done / RISE)
    fallen = min(1.0, max(0.0, (done - RISE) / (HARDENED - RISE)))
    return Homotopy(strength, FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** fallen)


def rate_at(step: int, settings: LearningSettings) -> float:
    """Learning rate of a step: rises with λ, then falls along half a cosine to a tenth."""
    done = step / settings.steps
    rise = min(1.0, (step + 1) / max(1.0, RISE * settings.steps))
    fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, done - RISE) / (1 - RISE)))
    return settings.rate * rise * fall
