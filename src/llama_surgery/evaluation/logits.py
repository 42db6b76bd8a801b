"""Logits of long inputs, a block of positions at a time.

At 128k tokens and a vocabulary of 128k the logits of one window are 66 GB in float32, while the
hidden states they are made from are 1 GB. So the model runs once, its final hidden states are kept,
and its output projection is applied to a block of them at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.surgery.supported import inner_model

#: Logits held at a time, in elements: 128 MB in float32.
BLOCK_ELEMENTS = 2**25

#: Tokens that a head is checked with.
CHECK_TOKENS = 64

# Rounding of bfloat16 logits stays well below 1% of their norm; a scale or a cap that was missed
# changes them by far more.
_TOLERANCE = 0.02


@torch.no_grad()
def read_windows(model: nn.Module, windows: torch.Tensor) -> None:
    """Runs the model over windows, (windows, length) int64, one by one, for what is recorded on the way."""
    for window in windows:
        model(input_ids=window[None].to(inner_model(model).device), use_cache=False, logits_to_keep=1)


@torch.no_grad()
def final_states(model: nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the model over one window, through its own ``forward``.

    Args:
        model: A causal language model of transformers, bare or wrapped by PEFT.
        input_ids: (length,), int64, on any device.

    Returns:
        The states that the output projection is applied to, (length, hidden), and the model's own
        logits of the last position, (vocabulary,), both in the model's dtype and on its device.

    Raises:
        UnsupportedModelError: The states cannot be observed.
    """
    inner = inner_model(model)
    caught: list[torch.Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0])

    handle = inner.get_decoder().register_forward_hook(catch)
    try:
        output = model(input_ids=input_ids[None].to(inner.device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    if len(caught) != 1 or caught[0].shape[:2] != (1, len(input_ids)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its decoder gave {[tuple(c.shape) for c in caught]} for "
            f"{len(input_ids)} tokens, where one (1, {len(input_ids)}, hidden) was expected. "
            "Compiled models and prompt-tuning adapters cannot be measured: give the plain model."
        )
    return caught[0][0], output.logits[0, -1]


class Head:
    """A model's way from final hidden states to logits, checked against the model's own logits.

    Every model ends in a projection; Gemma then caps the logits and Granite, Cohere and others
    scale them. The cap is read from the configuration; the scale, which has a different name in
    every family, is measured on the beginning of ``input_ids``, (length,), int64.

    Raises:
        UnsupportedModelError: The model has no output projection, or makes its logits in another
            way.
        SurgeryError: The logits are not finite.
    """

    def __init__(self, model: nn.Module, input_ids: torch.Tensor) -> None:
        inner = inner_model(model)
        projection = inner.get_output_embeddings()
        if projection is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output projection: give a causal language model."
            )
        self._projection = projection
        self._softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        self._scale = 1.0
        states, logits = final_states(model, input_ids[:CHECK_TOKENS])
        self._device = states.device
        self._step = max(1, BLOCK_ELEMENTS // len(logits))
        if not torch.isfinite(logits).all():
            raise SurgeryError(
                f"{type(model).__name__} gives logits that are not finite in {logits.dtype}. "
                "Check its weights, or load it in float32 or bfloat16."
            )
        ours = self._logits(states[-1])
        theirs = logits.to(ours)
        scale = (torch.dot(ours, theirs) / torch.dot(ours, ours)).item()
        error = torch.linalg.vector_norm(theirs - scale * ours) / torch.linalg.vector_norm(theirs)
        if not error.item() <= _TOLERANCE:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its logits differ by {error.item():.1%} from its output "
                "projection, scaled and capped, so they cannot be computed block by block."
            )
        # One is exact: a measured scale would only add its own rounding.
        self._scale = 1.0 if abs(scale - 1.0) <= _TOLERANCE else scale

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._projection(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits * self._scale if self._scale != 1.0 else logits

    @torch.no_grad()
    def blocks(self, *states: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Walks along the positions of final hidden states, each (length, hidden), on any device.

        Yields:
            The positions of the block, and the logits there for each of ``states``: (block,
            vocabulary), float32 (float64 for a float64 model), on the model's device.
        """
        length = len(states[0])
        for start in range(0, length, self._step):
            part = slice(start, min(start + self._step, length))
            yield part, [self._logits(s[part].to(self._device)) for s in states]
