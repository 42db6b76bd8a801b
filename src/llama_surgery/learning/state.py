"""What a run of learning consists of between two steps, and its checkpoints."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.files import write_atomically
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.price import Price
from llama_surgery.learning.settings import LearningSettings

#: Scaling of the loss for float16 models, halved whenever a gradient overflows.
FIRST_SCALE = 2.0**12
#: Memory of Adam's two moments: windows differ, steps are few.
BETAS = (0.9, 0.98)


@dataclasses.dataclass
class LearningState:
    """Everything a checkpoint holds.

    Attributes:
        corrections: The parameters.
        optimiser: Adam over them.
        price: Multiplier of the density and global θ.
        step: Steps done.
        scale: Scaling of the loss.
    """

    corrections: Corrections
    optimiser: torch.optim.Adam
    price: Price
    step: int = 0
    scale: float = 1.0

    def set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]

    def unscale(self) -> bool:
        """Divide the gradients by the scale. False, and a smaller scale, if one is not finite."""
        gradients = [p.grad for p in self.corrections.parameters() if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        for gradient in gradients:
            gradient.div_(self.scale)
        if not finite:
            self.scale /= 2
        return finite

    def offset_gradient(self) -> float:
        """Derivative of the objective in a common offset of all heads."""
        offsets = [layer.offset.grad for layer in self.corrections.values() if layer.offset.grad is not None]
        return float(torch.stack([gradient.double().sum().cpu() for gradient in offsets]).sum())

    @torch.no_grad()
    def centre_offsets(self) -> None:
        """Take out what all offsets have in common: that is θ's, which the density alone decides."""
        offsets = [layer.offset for layer in self.corrections.values()]
        common = torch.cat([offset.flatten().cpu() for offset in offsets]).mean()
        for offset in offsets:
            offset -= common.to(offset.device)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write a checkpoint, atomically.

        Raises:
            SurgeryError: The disk is full or the folder cannot be written.
        """
        content = {
            "corrections": self.corrections.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "price": dataclasses.asdict(self.price),
            "step": self.step,
            "scale": self.scale,
        }
        write_checkpoint(path, about, content)

    def load(self, path: Path, about: dict[str, Any]) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            SurgeryError: It cannot be read, or is of another run.
        """
        content = read_checkpoint(path, about)
        if content is None:
            return
        self.corrections.load_state_dict(content["corrections"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.price = Price(**content["price"])
        self.step, self.scale = content["step"], content["scale"]


def write_checkpoint(path: Path, about: dict[str, Any], content: dict[str, Any]) -> None:
    """Keep what a run consists of between two steps, and what it is a run of, atomically.

    Raises:
        SurgeryError: The disk is full or the folder cannot be written.
    """
    state = io.BytesIO()  # the library's own writing does not raise OSError where the disk is full
    torch.save({"about": about, **content}, state)
    write_atomically(path, lambda file: file.write_bytes(state.getvalue()), own=True)


def check_loss(loss: float, step: int) -> None:
    """Raise SurgeryError where the loss is NaN or infinite, and so would be what is learned from it."""
    if not math.isfinite(loss):
        raise SurgeryError(
            f"the loss of step {step + 1} is not finite. Check the model's weights, learn in float32 or "
            "bfloat16, or at a lower rate."
        )


def read_checkpoint(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`write_checkpoint` kept, tensors on the CPU, or None if there is no such file.

    Raises:
        SurgeryError: It cannot be read, or is of another run.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SurgeryError(f"{path} is damaged ({error}): remove it to start anew.") from error
    if not isinstance(content, dict) or not isinstance(content.get("about"), dict):
        raise SurgeryError(f"{path} is not a checkpoint of learning: name another file.")
    wanted, kept = _fields(about), _fields(content["about"])
    differing = sorted(name for name in wanted if wanted[name] != kept.get(name))
    if differing:
        raise SurgeryError(
            f"{path} is of another run ({', '.join(differing)} differ): remove it, or name another."
        )
    return content


def _fields(about: dict[str, Any]) -> dict[str, Any]:
    """What a run is of, parts of it as ``part.field``."""
    fields: dict[str, Any] = {}
    for name, value in about.items():
        own = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        fields |= own
    return fields


def first_state(
    corrections: Corrections, settings: LearningSettings, log_theta: float, half: bool
) -> LearningState:
    """The state before the first step.

    Args:
        corrections: On the model's device.
        settings: Rates.
        log_theta: Global log θ to begin with.
        half: The model computes in float16.
    """
    named = dict(corrections.named_parameters())
    trees = [p for name, p in named.items() if ".map_" in name]
    others = [p for name, p in named.items() if ".map_" not in name]
    # A map's entries act together, and an order of keys should change slowly.
    groups = [{"params": part, "share": share} for part, share in ((others, 1.0), (trees, 1 / 3)) if part]
    optimiser = torch.optim.Adam(groups, lr=settings.rate, betas=BETAS)
    return LearningState(corrections, optimiser, Price(log_theta), scale=FIRST_SCALE if half else 1.0)
