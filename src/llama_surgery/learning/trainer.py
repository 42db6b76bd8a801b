"""The trainer: steps over windows, checkpoints, resuming."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.learning.attach import Gates, gates_in
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.processes import ALONE, Processes
from llama_surgery.learning.reading import Reading
from llama_surgery.learning.settings import LearningSettings, homotopy_at, rate_at
from llama_surgery.learning.state import LearningState, check_loss, first_state
from llama_surgery.surgery.adapter import weights_digest
from llama_surgery.surgery.context import check_far_field
from llama_surgery.surgery.metric import metric_of
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.geometry import first_far

#: Rows whose logits are compared at a time.
LOGIT_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step measured, on average over the processes that took it.

    Attributes:
        step: Steps done, this one included.
        loss: KL divergence a row in nats, or squared output error relative to the residual stream.
        density: Executed far density of the window, at τ = 0.
        soft_density: The same through soft gates.
        mass_lost: Expected share of attention on far pages that rows do not see.
        theta: Global θ after the step.
        seconds: Wall time since the run began in this process.
    """

    step: int
    loss: float
    density: float
    soft_density: float
    mass_lost: float
    theta: float
    seconds: float


def learn(
    model: torch.nn.Module,
    config: SurgeryConfig,
    windows: torch.Tensor,
    settings: LearningSettings,
    *,
    checkpoint_file: Path | None = None,
    every_seconds: float = 60.0,
    progress: Callable[[Step], None] | None = None,
    processes: Processes = ALONE,
) -> Corrections:
    """Learn corrections to the topology of a dense model, whose weights stay as they are.

    With ``checkpoint_file``, a call with the same arguments goes on from the last checkpoint: a run that was
    killed at any moment ends where an uninterrupted one would.

    Args:
        model: A dense decoder in evaluation mode; dense again afterwards.
        config: The topology to correct, for its own tile, θ calibrated for the density; a checkpoint has its
            own.
        windows: (count, length) int64 training windows, taken in turn, one in a step of every process.
        settings: What to learn and how.
        checkpoint_file: Where the state is kept.
        every_seconds: Time between checkpoints; 0 for one after every step.
        progress: Told every step, in the main process.
        processes: Those that learn together, all called with the same arguments. They end with the same
            corrections.

    Raises:
        SurgeryError: The model cannot be learned on, or the checkpoint is of another run.
    """
    check_settings(config, windows, settings)
    if model.training:
        raise SurgeryError("the model is in training mode: call model.eval() first.")
    inner = inner_model(model)
    start = fresh_corrections(inner, settings, metric_of(inner)).to(inner.device)
    state = first_state(start, settings, math.log(config.theta), half=inner.dtype == torch.float16)
    gates = Gates(state.corrections, config, state.price.log_theta)

    def measure(number: int) -> torch.Tensor:
        ids = windows[number][None].to(inner.device)
        loss = _divergence(model, ids, gates)
        soft = gates.reading.soft_density()
        ((loss.to(soft.device) + state.price.value * soft) * state.scale).backward()
        return loss.detach()

    with frozen(model), gates_in(model, gates):
        run(
            measure,
            state,
            gates,
            windows,
            settings,
            "logits",
            weights_digest(inner),
            checkpoint_file=checkpoint_file,
            every_seconds=every_seconds,
            progress=progress,
            processes=processes,
        )
    return state.corrections


def fresh_corrections(
    inner: PreTrainedModel, settings: LearningSettings, metric: Mapping[int, torch.Tensor]
) -> Corrections:
    """Corrections of a model that are still the training-free topology.

    Args:
        inner: The model.
        settings: What is learned.
        metric: Weights that keys are sorted in, by layer index: ``surgery.metric.metric_of``.
    """
    shapes = {index: head_shape(inner, module) for index, module in attention_modules(inner).items()}
    corrections = Corrections.build(shapes, settings.parts, settings.seed)
    for index, weight in metric.items():
        corrections[str(index)].key_weight = weight
    return corrections


def run(
    measure: Callable[[int], torch.Tensor],
    state: LearningState,
    gates: Gates,
    windows: torch.Tensor,
    settings: LearningSettings,
    loss: str,
    model: str,
    *,
    checkpoint_file: Path | None,
    every_seconds: float,
    progress: Callable[[Step], None] | None,
    processes: Processes = ALONE,
) -> None:
    """Take the steps that are left. Other arguments are those of :func:`learn`.

    Args:
        measure: Given the number of a window, computes the loss of ``state.corrections`` there, adds the
            gradients of ``(loss + price · soft density) · scale`` and fills ``gates.reading``; returns the
            loss.
        state: Where to begin, unless the checkpoint file says more; changed.
        gates: What ``measure`` reads; set anew for every step.
        loss: Name of the loss, by which checkpoints are told apart.
        model: Digest of the model's weights, likewise.

    Raises:
        SurgeryError: The checkpoint is of another run.
    """
    about = {
        "settings": {**settings.to_dict(), "stage": loss},
        # Without θ, which the state goes on from: calibrating anew finds another last digit.
        "config": {k: v for k, v in gates.config.to_dict().items() if not k.startswith("theta")},
        "windows": digest(windows),
        "model": model,
        "processes": processes.count,
    }
    if checkpoint_file is not None:
        state.load(checkpoint_file, about)
    begun = saved = time.monotonic()
    while state.step < settings.steps:
        number = processes.window(state.step, len(windows))
        measured = _step(measure, number, settings, state, gates, processes)
        if progress is not None and processes.main:
            progress(dataclasses.replace(measured, seconds=time.monotonic() - begun))
        due = time.monotonic() - saved >= every_seconds or state.step == settings.steps
        if checkpoint_file is not None and due and processes.main:
            state.save(checkpoint_file, about)
            saved = time.monotonic()


def _step(
    measure: Callable[[int], torch.Tensor],
    number: int,
    settings: LearningSettings,
    state: LearningState,
    gates: Gates,
    processes: Processes,
) -> Step:
    """One step: forward, backward, update. What is random in it is a function of seed and step."""
    gates.homotopy = homotopy_at(state.step, settings)
    gates.generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + state.step)
    gates.log_theta, gates.reading = state.price.log_theta, Reading()
    state.optimiser.zero_grad(set_to_none=True)
    loss = measure(number)
    reading = gates.reading
    processes.average_gradients(state.corrections.parameters())
    mean_loss, density, soft_density, mass_lost, slope = processes.average(
        [
            float(loss),
            reading.density(),
            float(reading.soft_density().detach()),
            reading.mass_lost(),
            reading.density_slope(),
        ],
        loss.device,
    )
    check_loss(mean_loss, state.step)
    if state.unscale():
        state.price.account(state.offset_gradient(), slope)
        state.set_rate(rate_at(state.step, settings))
        state.optimiser.step()
        state.centre_offsets()
    state.price.follow(density, settings.density)
    state.step += 1
    return Step(
        step=state.step,
        loss=mean_loss,
        density=density,
        soft_density=soft_density,
        mass_lost=mass_lost,
        theta=math.exp(state.price.log_theta),
        seconds=0.0,
    )


def _divergence(model: torch.nn.Module, ids: torch.Tensor, gates: Gates) -> torch.Tensor:
    """Mean KL divergence of the dense model's next-token distributions from those through the gates.

    Only rows with a far field are compared: the others are the same in both.
    """
    length = ids.shape[1]
    first = first_far(gates.config)
    kept = torch.arange(first, length, device=ids.device)
    gates.mode = "dense"
    with torch.no_grad():
        teacher = model(ids, use_cache=False, logits_to_keep=kept).logits[0]
    gates.mode = "gated"
    student = model(ids, use_cache=False, logits_to_keep=kept).logits[0]
    parts = [
        checkpoint(
            _kl,
            teacher[part : part + LOGIT_ROWS],
            student[part : part + LOGIT_ROWS],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part in range(0, len(kept), LOGIT_ROWS)
    ]
    return torch.stack(parts).sum() / len(kept)


def _kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(teacher ‖ student), float32, logits (rows, vocabulary)."""
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum()


def check_settings(config: SurgeryConfig, windows: torch.Tensor, settings: LearningSettings) -> None:
    """
    Raises:
        SurgeryError: Configuration, windows and settings do not fit together.
    """
    if config.theta <= 0 or config.topology != "pages":
        raise SurgeryError(
            "learning starts from pages opened by a threshold: calibrate θ for the density first."
        )
    if "summary" in settings.parts and config.summary == "none":
        raise SurgeryError("parts='summary': the configuration has no summary to weigh, set one.")
    if windows.dim() != 2 or windows.shape[1] != settings.length or settings.length % config.tile:
        raise SurgeryError(
            f"windows {tuple(windows.shape)}: expected (count, {settings.length}), a multiple of "
            f"tile={config.tile}."
        )
    check_far_field(settings.length, config)


def digest(windows: torch.Tensor) -> list[int]:
    """A few numbers by which other windows are told apart."""
    weights = torch.arange(windows.numel()).reshape(windows.shape) % 1009 + 1
    return [*windows.shape, int((windows.cpu() * weights).sum())]


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients for the weights."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
