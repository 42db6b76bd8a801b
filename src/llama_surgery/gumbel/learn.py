"""Training content routers, with checkpoints."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.gumbel.layer import GumbelLayer
from llama_surgery.gumbel.router import ContentRouter, routers_for
from llama_surgery.gumbel.soft import Drawing
from llama_surgery.learning.state import check_loss, read_checkpoint, write_checkpoint
from llama_surgery.learning.trainer import digest, frozen
from llama_surgery.surgery.adapter import weights_digest
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import reset_statistics, statistics, surgery_of
from llama_surgery.surgery.supported import attention_modules, inner_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class GumbelLearning:
    """How content routers are trained.

    Attributes:
        steps: Steps, each on one window.
        rate: Adam's learning rate.
        balance: Weight of the load balance at the end of its ramp.
        first_temperature: Of Gumbel-softmax and soft mask at the start.
        last_temperature: At the end; geometric in between.
        seed: Of routers and noise.

    Raises:
        SurgeryError: A value is out of range.
    """

    steps: int = 300
    rate: float = 1e-3
    balance: float = 1.0
    first_temperature: float = 1.0
    last_temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < float("inf"):
            raise SurgeryError(f"steps={self.steps}, rate={self.rate}: must be at least 1 and positive.")
        if not 0 < self.last_temperature <= self.first_temperature:
            raise SurgeryError(
                f"first_temperature={self.first_temperature}, last_temperature={self.last_temperature}: must "
                "be positive and fall."
            )


@dataclasses.dataclass(frozen=True)
class GumbelStep:
    """Steps done, language-model loss in nats, load balance and measured total density of one window."""

    step: int
    loss: float
    balance: float
    density: float


def learn_gumbel(
    model: torch.nn.Module,
    config: SurgeryConfig,
    windows: torch.Tensor,
    settings: GumbelLearning,
    progress: Callable[[GumbelStep], None] | None = None,
    *,
    checkpoint_file: Path | None = None,
    every_seconds: float = 60.0,
) -> dict[int, ContentRouter]:
    """Train content routers with the language-model loss of the frozen model, which comes back dense.

    Checkpoints are those of :func:`llama_surgery.learning.trainer.learn`. ``windows`` are (count, length)
    int64; step s takes window s modulo count.

    Returns:
        Routers by layer index, for ``operate(model, config, routers=…)``.

    Raises:
        SurgeryError: Another topology, windows longer than the routers' trees are for, or a checkpoint of
            another run.
    """
    gumbel = config.gumbel
    if gumbel is None:
        raise SurgeryError(f"topology={config.topology!r}: content routers are those of topology='gumbel'.")
    if windows.dim() != 2 or windows.shape[1] > gumbel.length:
        raise SurgeryError(
            f"windows {tuple(windows.shape)}: expected (count, length) of at most length={gumbel.length} "
            "tokens."
        )
    inner = inner_model(model)
    routers = routers_for(inner, attention_modules(inner), gumbel, settings.seed)
    named = torch.nn.ModuleDict({str(index): router for index, router in routers.items()}).to(inner.device)
    optimiser = torch.optim.Adam(named.parameters(), lr=settings.rate)
    about = {
        "settings": dataclasses.asdict(settings),
        "gumbel": gumbel.to_dict(),
        "windows": digest(windows),
        "model": weights_digest(inner),
    }
    done = 0
    if checkpoint_file is not None and (content := read_checkpoint(checkpoint_file, about)) is not None:
        named.load_state_dict(content["routers"])
        optimiser.load_state_dict(content["optimiser"])
        done = content["step"]
    saved = time.monotonic()
    with frozen(model), operated(model, config, routers=routers):
        for step in range(done, settings.steps):
            measured = _step(model, windows[step % len(windows)], step, settings, optimiser)
            if progress is not None:
                progress(measured)
            due = time.monotonic() - saved >= every_seconds or step + 1 == settings.steps
            if checkpoint_file is not None and due:
                state = {"routers": named.state_dict(), "optimiser": optimiser.state_dict()}
                write_checkpoint(checkpoint_file, about, {**state, "step": step + 1})
                saved = time.monotonic()
    return routers


def _step(
    model: torch.nn.Module,
    window: torch.Tensor,
    step: int,
    settings: GumbelLearning,
    optimiser: torch.optim.Optimizer,
) -> GumbelStep:
    """Forward, backward, update. What is random in it is a function of seed and step."""
    done = step / max(1, settings.steps - 1)
    fall = settings.last_temperature / settings.first_temperature
    noise = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    drawing = Drawing(settings.first_temperature * fall**done, noise)
    layers: dict[int, GumbelLayer] = surgery_of(model)
    for layer in layers.values():
        layer.drawing = drawing
    reset_statistics(model)
    ids = window[None].to(inner_model(model).device)
    loss = model(ids, labels=ids, use_cache=False).loss.float()
    check_loss(float(loss.detach()), step)
    balance = torch.stack([part.to(loss.device) for part in drawing.balances]).mean()
    optimiser.zero_grad(set_to_none=True)
    (loss + settings.balance * done * balance).backward()
    parameters = [weight for layer in layers.values() for weight in layer.router.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if torch.isfinite(norm):
        optimiser.step()
    read = statistics(model)
    density = read.near_density + read.visible_far_density
    return GumbelStep(step + 1, float(loss.detach()), float(balance.detach()), density)
