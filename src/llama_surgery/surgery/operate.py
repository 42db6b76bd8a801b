"""Operating on a model, and taking the topology out again."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.calibrate import (
    USUAL,
    calibrate,
    calibration_windows,
    check_densities,
)
from llama_surgery.surgery.head_budgets import budgets_where_none
from llama_surgery.surgery.hooks import hook
from llama_surgery.surgery.layer import ATTRIBUTE, LayerSurgery
from llama_surgery.surgery.metric import metric_of
from llama_surgery.surgery.operation import (
    Operation,
    check_executable,
    is_operated,
    operation_of,
    room_of,
)
from llama_surgery.surgery.pays import usual_dense_until
from llama_surgery.surgery.progress import Progress, counted
from llama_surgery.surgery.replace import check_replaceable, replace
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.router import PageRouter

Model = TypeVar("Model", bound=torch.nn.Module)


def operate(
    model: Model,
    config: SurgeryConfig | None = None,
    *,
    routers: Mapping[int, PageRouter] | Mapping[int, torch.nn.Module] | None = None,
    density: float | None = None,
    max_loss: float | None = None,
    text: list[str] | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    decode_density: float | None = None,
    measure_speed: bool | None = None,
    progress: Progress | None = None,
) -> Model:
    """Give every full-attention layer of ``model`` the configured topology. No weight changes.

    The same object comes back, operated; ``forward`` and ``generate`` work as before. With ``density``
    and ``text`` the threshold of prompts is calibrated so that the executed far density does not exceed
    ``density`` on that text. With ``max_loss`` instead it is the highest one at which the model's perplexity
    on the text stays within that loss; :func:`~llama_surgery.measured_loss` says what came out. Both give
    every head a budget of its own (:mod:`~llama_surgery.surgery.head_budgets`). Decode steps, and the rows
    that end a prompt, read everything unless ``decode_density`` is given too.

    Args:
        model: A Hugging Face decoder, possibly wrapped by PEFT.
        config: The topology; the documented defaults if None.
        routers: Learned corrections by layer index. If None, keys are sorted in the metric of the layer's
            queries (:func:`~llama_surgery.surgery.metric.metric_of`), for which the model runs once on 256
            tokens; an empty mapping leaves that out. Offsets of heads stay as they are given. With
            ``topology="gumbel"`` content routers, and untrained ones, with which the model is dense, if None.
        density: Largest executed far density, over causal pairs, at ``length``.
        max_loss: Instead of ``density``, the largest relative rise of perplexity: 0.01 is one per cent.
        text: Documents to calibrate on; needs ``density`` or ``max_loss``, and ``tokenizer``.
        tokenizer: The model's tokenizer.
        length: Tokens of a calibration window; if None the model's context, at most 8,192, halved until the
            text holds one.
        decode_density: Largest executed far density of decode steps; needs ``density``. Without, their θ
            stays as ``config`` has it: by default they read everything.
        measure_speed: Set ``dense_until`` to the position from which on sparse is faster here, so that no
            prompt is read slower than by the dense model: prompts of rising length are read, dense and
            sparse, for half a minute at most, but on a CPU, where that takes too long, it is 4,096. If None,
            where thresholds are set on text and no ``config`` is given. Needs ``text``.
        progress: With ``text``, whose reading takes seconds to minutes: called as ``progress(stage, done,
            total)`` after each pass of the model. If None, there are bars like transformers' own, on
            terminals and in notebooks alone; ``transformers.utils.logging.disable_progress_bar()`` turns
            them off.

    Raises:
        UnsupportedModelError: The model cannot be operated, with the reason.
        SurgeryError: It is operated already, the arguments do not fit together, or it cannot be made sparse
            within ``max_loss``.
        TextError: The text is too short.
    """
    inner = inner_model(model)
    if measure_speed is None:
        measure_speed = config is None and text is not None
    config = SurgeryConfig() if config is None else config
    if not isinstance(config, SurgeryConfig):
        raise SurgeryError(f"config={config!r}: give a SurgeryConfig, such as SurgeryConfig(theta=0.1).")
    if is_operated(model):
        raise SurgeryError("the model is operated already: eject(model) first.")
    if max_loss is not None and (density is not None or decode_density is not None):
        raise SurgeryError(
            f"max_loss={max_loss} and a density: one of them sets the threshold. Leave the other out."
        )
    if (density is None and max_loss is None) != (text is None) or (
        text is None and decode_density is not None
    ):
        raise SurgeryError(
            "density or max_loss, decode_density and text go together: thresholds are calibrated on text."
        )
    if measure_speed and text is None:
        raise SurgeryError("measure_speed=True without text: what is timed is how fast text is read.")
    modules, measured = attention_modules(inner), None
    if text is not None and max_loss is not None:
        # By name: the room that measures losses stands on this one.
        budget = importlib.import_module("llama_surgery.evaluation.loss_budget")
        config, routers, measured = budget.config_within(
            model, tokenizer, text, max_loss, length, config, routers, progress
        )
    base = check_replaceable(inner, modules.values())
    check_executable(inner, modules, config)
    if density is not None:
        check_densities(config, density, decode_density)
    if text is not None and (density is not None or measure_speed):
        ids = calibration_windows(model, tokenizer, text, length, config)
    if config.topology == "pages" and routers is None:
        routers = {index: PageRouter(key_weight=weight) for index, weight in metric_of(inner).items()}
    layers = _layers(inner, modules, config, routers or {})
    if text is not None and density is not None:
        budgets = budgets_where_none(model, ids, config, routers or {}, density, progress)
        if budgets is not None:
            config = dataclasses.replace(config, theta=budgets.theta)
            layers = _layers(inner, modules, config, budgets.routers)
    operation = Operation(config, modules, replace(inner, base, modules.values()), measured)
    inner.__dict__[ATTRIBUTE] = operation
    try:
        for index, module in modules.items():
            module.__dict__[ATTRIBUTE] = layers[index]
        hook(inner, operation)
        if text is not None and density is not None:
            with counted(inner, "thresholds", USUAL * len(ids), progress):
                calibrate(model, ids, density, decode_density=decode_density)
        if measure_speed:
            until = usual_dense_until(inner, ids, progress)
            operation.use(dataclasses.replace(operation.config, dense_until=until))
    except BaseException:
        eject(model)
        raise
    return model


def _layers(
    inner: PreTrainedModel,
    modules: Mapping[int, torch.nn.Module],
    config: SurgeryConfig,
    routers: Mapping[int, Any],
) -> dict[int, Any]:
    """What the operated modules are to carry, by layer index."""
    if (room := room_of(config)) is not None:
        return room.layers(inner, modules, config, routers)
    unknown = sorted(routers.keys() - modules.keys())
    if unknown:
        raise SurgeryError(
            f"routers for layers {unknown}, which are not operated: learn them for this model."
        )
    for index, router in routers.items():
        if not isinstance(router, PageRouter):
            raise SurgeryError(
                f"the router of layer {index} is a {type(router).__name__}: set topology='gumbel'."
            )
        router.check(*head_shape(inner, modules[index]))
    return {index: LayerSurgery(config, routers.get(index)) for index in modules}


def eject(model: Model) -> Model:
    """Take the topology out. The model is bit-identical to what it was before.

    Raises:
        SurgeryError: The model is not operated.
    """
    inner = inner_model(model)
    operation = operation_of(model)
    operation.undo()
    for module in operation.modules.values():
        module.__dict__.pop(ATTRIBUTE, None)
    inner.__dict__.pop(ATTRIBUTE, None)
    return model


@contextlib.contextmanager
def operated(model: Model, config: SurgeryConfig | None = None, **arguments: Any) -> Iterator[Model]:
    """:func:`operate` for the length of a ``with`` block; always ejects."""
    operate(model, config, **arguments)
    try:
        yield model
    finally:
        if is_operated(model):
            eject(model)
