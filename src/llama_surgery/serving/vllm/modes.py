"""The switch of a request: dense, though the server is operated."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from llama_surgery.serving.counting import EngineCounters
from llama_surgery.serving.vllm.compat import without_tokens

#: Name among a request's ``extra_args`` (over HTTP ``vllm_xargs``): dense if true, 1, "true" or "1".
SWITCH = "llama_surgery_dense"


def asks_for_dense(params: Any) -> bool:
    """Do a request's sampling parameters ask for dense attention?"""
    asked = (getattr(params, "extra_args", None) or {}).get(SWITCH)
    return asked.lower() in ("1", "true") if isinstance(asked, str) else bool(asked)


def engine_of(vllm_config: Any) -> EngineCounters:
    """What the operated layers of an engine share."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return next(layer.surgery.engine for layer in layers if hasattr(layer, "surgery"))


class BatchModes(LogitsProcessor):
    """Tells layers which requests of the first model runner's batch are dense. It changes no logits: what is
    told of requests that come and go is told to logits processors alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._config, self._dense = vllm_config, dict[int, bool]()
        without_tokens(BatchModes)

    def update_state(self, batch_update: Any) -> None:
        """See the engine's; called before each step's metadata are built."""
        if batch_update is not None:
            engine_of(self._config).joined += 1
        if process_dict_updates(self._dense, batch_update, lambda params, *_: asks_for_dense(params) or None):
            engine_of(self._config).dense = frozenset(self._dense)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """It is."""
        return True
