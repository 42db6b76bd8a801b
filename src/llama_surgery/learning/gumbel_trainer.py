"""Training content routers, with checkpoints."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.learning.gumbel import Gumbel, GumbelSettings, gumbel_for
from llama_surgery.learning.gumbel_attach import gumbel_in
from llama_surgery.learning.state import read_checkpoint, write_checkpoint
from llama_surgery.learning.trainer import digest, frozen
from llama_surgery.surgery.supported import inner_model


@dataclasses.dataclass(frozen=True)
class GumbelStep:
    """Steps done, language-model loss in nats, load balance and measured total density of one window."""

    step: int
    loss: float
    balance: float
    density: float


def learn_gumbel(
    model: torch.nn.Module,
    windows: torch.Tensor,
    settings: GumbelSettings,
    progress: Callable[[GumbelStep], None] | None = None,
    *,
    checkpoint_file: Path | None = None,
    every_seconds: float = 60.0,
) -> Gumbel:
    """Train content routers with the language-model loss of the frozen model.

    With ``checkpoint_file``, a call with the same arguments goes on from the last checkpoint: a run that was
    killed at any moment ends where an uninterrupted one would.

    Args:
        model: A dense decoder in evaluation mode.
        windows: (count, length) int64; step s takes window s modulo count.
        settings: How.
        progress: Told every step.
        checkpoint_file: Where the state is kept.
        every_seconds: Time between checkpoints; 0 for one after every step.

    Raises:
        SurgeryError: Windows are longer than the routers' trees are for, or the checkpoint is of another run.
    """
    if windows.dim() != 2 or windows.shape[1] > settings.length:
        raise SurgeryError(
            f"windows {tuple(windows.shape)}: expected (count, length) of at most length={settings.length} "
            "tokens."
        )
    gumbel = gumbel_for(model, settings)
    gumbel.training = True
    optimiser = torch.optim.Adam(gumbel.routers.parameters(), lr=settings.rate)
    about, done = {"settings": settings.to_dict(), "windows": digest(windows)}, 0
    if checkpoint_file is not None and (content := read_checkpoint(checkpoint_file, about)) is not None:
        gumbel.routers.load_state_dict(content["routers"])
        optimiser.load_state_dict(content["optimiser"])
        done = content["step"]
    saved = time.monotonic()
    with frozen(model), gumbel_in(model, gumbel):
        for step in range(done, settings.steps):
            measured = _step(model, windows[step % len(windows)], step, gumbel, optimiser)
            if progress is not None:
                progress(measured)
            due = time.monotonic() - saved >= every_seconds or step + 1 == settings.steps
            if checkpoint_file is not None and due:
                state = {"routers": gumbel.routers.state_dict(), "optimiser": optimiser.state_dict()}
                write_checkpoint(checkpoint_file, about, {**state, "step": step + 1})
                saved = time.monotonic()
    gumbel.training = False
    gumbel.balances = []
    gumbel.reset()
    return gumbel


def _step(
    model: torch.nn.Module,
    window: torch.Tensor,
    step: int,
    gumbel: Gumbel,
    optimiser: torch.optim.Optimizer,
) -> GumbelStep:
    """Forward, backward, update. What is random in it is a function of seed and step."""
    settings = gumbel.settings
    done = step / max(1, settings.steps - 1)
    fall = settings.last_temperature / settings.first_temperature
    gumbel.temperature = settings.first_temperature * fall**done
    gumbel.generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    gumbel.balances = []
    gumbel.reset()
    ids = window[None].to(inner_model(model).device)
    loss = model(ids, labels=ids, use_cache=False).loss.float()
    balance = torch.stack([part.to(loss.device) for part in gumbel.balances]).mean()
    optimiser.zero_grad(set_to_none=True)
    (loss + settings.balance * done * balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(gumbel.routers.parameters(), 1.0)
    if torch.isfinite(norm):
        optimiser.step()
    return GumbelStep(step + 1, float(loss.detach()), float(balance.detach()), gumbel.density())
