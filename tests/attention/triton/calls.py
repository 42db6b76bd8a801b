"""Calls of the kernels, past what decides who executes."""

from typing import Any

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.router import PageRouter


def called(
    function: Any,
    queries: torch.Tensor,
    *states: Any,
    config: SurgeryConfig,
    tile: int | None = None,
    softcap: float | None = None,
    router: PageRouter | None = None,
    **given: Any,
) -> Any:
    """Call a function of an AttentionCall and states with the arguments of ``api.attend``."""
    tile = config.tile if tile is None else tile
    call = AttentionCall(config, "triton", tile, queries.shape[-1] ** -0.5, softcap, router)
    return function(call, queries, *states, **given)
