"""What the surgery room asks of this topology: see :func:`llama_surgery.surgery.operation.room_of`."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.gumbel.cache import BallCache
from llama_surgery.gumbel.layer import ROUTED, GumbelLayer
from llama_surgery.gumbel.router import ContentRouter, routers_for
from llama_surgery.surgery.calls import untraced
from llama_surgery.surgery.layer import ATTRIBUTE

cache = BallCache


def layers(
    inner: PreTrainedModel,
    modules: Mapping[int, torch.nn.Module],
    config: SurgeryConfig,
    routers: Mapping[int, ContentRouter] | None,
) -> dict[int, GumbelLayer]:
    """What the modules of an operated model carry, by layer index. Without routers, untrained ones.

    Raises:
        SurgeryError: Routers of other layers, or of another configuration.
    """
    assert config.gumbel is not None
    wanted = routers_for(inner, modules, config.gumbel)
    if routers is None or not routers:
        return {index: GumbelLayer(config, router) for index, router in wanted.items()}
    if routers.keys() != wanted.keys():
        raise SurgeryError(
            f"content routers for layers {sorted(routers)}, operated are {sorted(wanted)}: learn them for "
            "this model."
        )
    for index, router in routers.items():
        same = isinstance(router, ContentRouter) and router.shapes == wanted[index].shapes
        if not same or router.backbone.in_features != wanted[index].backbone.in_features:
            raise SurgeryError(
                f"the content router of layer {index} does not fit the model, or not arities="
                f"{config.gumbel.arities} and length={config.gumbel.length}: learn them again."
            )
    return {index: GumbelLayer(config, router) for index, router in routers.items()}


@untraced
def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-forward hook of operated modules: asks the router, and hands on what it says."""
    layer: GumbelLayer = module.__dict__[ATTRIBUTE]
    given = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    index: Any = module.layer_idx
    held = given.layers[index] if given is not None and index < len(given.layers) else None
    routed = layer.route(args[0] if args else kwargs["hidden_states"], held)
    return args, {**kwargs, ROUTED: routed}


def routers(
    inner: PreTrainedModel, config: SurgeryConfig, parts: Mapping[int, Mapping[str, torch.Tensor]]
) -> dict[int, ContentRouter]:
    """Routers of a model from their tensors, by layer index.

    Raises:
        SurgeryError: Tensors of another model or configuration.
    """
    assert config.gumbel is not None
    found = routers_for(inner, parts, config.gumbel)
    for index, router in found.items():
        try:
            router.load_state_dict(dict(parts[index]))
        except RuntimeError as error:
            raise SurgeryError(f"the content router of layer {index} does not fit: {error}") from error
    return found
