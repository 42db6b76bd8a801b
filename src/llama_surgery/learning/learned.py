"""From text to a model that is operated with corrections learned on it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.learning.corrections import Part, scorer_parameters
from llama_surgery.learning.processes import ALONE, Processes
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.trainer import Step
from llama_surgery.learning.trainer import learn as learn_corrections
from llama_surgery.surgery.calibrate import USUAL, calibrate, calibration_windows
from llama_surgery.surgery.operate import operate, operated
from llama_surgery.surgery.progress import Progress, counted, told_or_shown
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows as cut_windows

#: Training windows unless others are asked for, where the text holds as many.
WINDOWS = 200

Model = TypeVar("Model", bound=torch.nn.Module)


def learn(
    model: Model,
    config: SurgeryConfig | None = None,
    *,
    density: float,
    text: list[str],
    tokenizer: Any,
    length: int | None = None,
    steps: int = LearningSettings.steps,
    parts: Sequence[Part] | None = None,
    rate: float = LearningSettings.rate,
    windows: int | None = None,
    seed: int = 0,
    measure_speed: bool | None = None,
    checkpoint_file: Path | None = None,
    every_seconds: float = 60.0,
    progress: Progress | None = None,
    report: Callable[[Step], None] | None = None,
    processes: Processes = ALONE,
) -> Model:
    """:func:`~llama_surgery.operate` on a model with corrections that are learned on text first.

    The weights stay as they are. Some minutes on a GPU for half a billion parameters, hours on a CPU.
    :func:`~llama_surgery.save_adapter` keeps what was learned.

    Args:
        model: A dense decoder in evaluation mode.
        config: The topology; the documented defaults if None.
        density: Largest executed far density, over causal pairs, at ``length``.
        text: Documents like what the model will read.
        tokenizer: The model's tokenizer.
        length: Tokens of a window; the model's context, at most 8,192, if None.
        steps: Steps, each on one window.
        parts: What is learned beside the heads' budgets; weights of channels, and of summaries where there
            are any, if None.
        rate: See :class:`~llama_surgery.learning.settings.LearningSettings`.
        windows: Training windows, taken in turn; 200, or as many as the text holds, if None.
        seed: Of windows and starting values.
        measure_speed: See :func:`~llama_surgery.operate`.
        checkpoint_file: Where the state is kept, so that the same call goes on from there.
        every_seconds: Time between checkpoints.
        progress: See :func:`~llama_surgery.operate`.
        report: Told every step, in the main process.
        processes: Those that learn together. All but the main one are handed the model back dense.

    Raises:
        UnsupportedModelError: The model cannot be operated or learned on, with the reason.
        SurgeryError: It is operated already or in training mode, or the arguments do not fit together.
        TextError: The text is too short.
    """
    inner = inner_model(model)
    if measure_speed is None:
        measure_speed = config is None
    config = SurgeryConfig() if config is None else config
    if config.topology != "pages":
        raise SurgeryError(
            f"topology={config.topology!r}: learn() corrects pages. Content routers are learned by "
            "llama_surgery.gumbel.learn.learn_gumbel, or 'llama-surgery learn --topology gumbel'."
        )
    few = calibration_windows(model, tokenizer, text, length, config)
    length = few.shape[1] - few.shape[1] % config.tile
    if parts is None:
        parts = usual_parts(config)
    settings = LearningSettings(
        density=density, length=length, steps=steps, parts=tuple(parts), rate=rate, seed=seed
    )
    ids = cut_windows(tokenizer, text, length, windows, seed, usual=WINDOWS)
    if checkpoint_file is not None and checkpoint_file.exists():
        first = dataclasses.replace(config, theta=1.0)  # the checkpoint has the θ to go on from
    else:  # one threshold for all heads: their budgets are learned
        with counted(inner, "first threshold", USUAL * len(few), progress), operated(model, config):
            first = calibrate(model, few, density)
    first = processes.agreed(first)  # to the last digit: GPUs may round differently
    with told_or_shown("learning", steps, progress) as tell:

        def each(step: Step) -> None:
            tell("learning", step.step, steps)
            if report is not None:
                report(step)

        corrections = learn_corrections(
            model,
            first,
            ids,
            settings,
            checkpoint_file=checkpoint_file,
            every_seconds=every_seconds,
            progress=each,
            processes=processes,
        )
    if not processes.main:
        return model
    return operate(
        model,
        config,
        routers=scorer_parameters(corrections),
        density=density,
        text=text,
        tokenizer=tokenizer,
        length=length,
        measure_speed=measure_speed,
        progress=progress,
    )


def usual_parts(config: SurgeryConfig) -> tuple[Part, ...]:
    """What is learned beside budgets unless told otherwise: weights of channels, and of summaries if any."""
    return ("channels",) if config.summary == "none" else ("channels", "summary")
