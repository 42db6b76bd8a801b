"""What streaming computes, in memory: errors of layers' outputs on the dense model's own states."""

import functools
from typing import Any

import torch

from llama_surgery.learning.attach import Gates, local_error
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules


def local_errors(model: torch.nn.Module, ids: torch.Tensor, gates: Gates) -> torch.Tensor:
    """(layers,) mean squared errors over those of the residual stream, with gradient.

    Args:
        model: Dense.
        ids: (1, n) int64.
        gates: ``gates.reading`` is filled.
    """
    norms, errors = {}, []

    def attention(base: str, module: Any, *states: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        with torch.no_grad():
            out = dense_attention(base, module, *states, **keywords)[0]
        router = gates.corrections[str(module.layer_idx)].router()
        weight = module.o_proj.weight.detach()
        error = local_error(weight, *states[:3], out, router, gates, keywords["scaling"])
        errors.append(error / norms[module.layer_idx])
        return out, None

    def note(index: int, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        norms[index] = hidden.detach().float().square().sum(-1).mean()

    handles = [
        layer.register_forward_pre_hook(functools.partial(note, index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    with attention_replaced(model, attention_modules(model).values(), attention):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(errors)
