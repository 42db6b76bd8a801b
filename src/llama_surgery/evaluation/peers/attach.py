"""Running a model under a peer's rule, and taking the rule out again."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.evaluation.peers.executor import PairCount, attend_by_rule
from llama_surgery.evaluation.peers.rule import Call, Rule
from llama_surgery.surgery.operation import is_operated
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules, inner_model


@contextlib.contextmanager
def running(model: nn.Module, rule: Rule) -> Iterator[PairCount]:
    """Let every full-attention layer of a dense model follow ``rule``; other layers stay dense.

    ``forward`` and ``generate`` work as before, with the model's own cache. Sequences of a batch must have
    one length.

    Args:
        model: A dense causal language model of transformers.
        rule: What rows may see.

    Yields:
        The count of what is read.

    Raises:
        SurgeryError: The model is operated.
        UnsupportedModelError: The model, or a call, is one that rules cannot be run on.
    """
    if is_operated(model):
        raise SurgeryError("the model is operated: eject(model) first, peers run on the dense model.")
    inner = inner_model(model)
    count = PairCount()
    attention = functools.partial(_attention, rule, count)
    with attention_replaced(inner, attention_modules(inner).values(), attention):
        yield count


def _attention(
    rule: Rule,
    count: PairCount,
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function: queries (batch, heads, new, head_dim), keys and values of all positions so far."""
    if attention_mask is not None and (attention_mask.ndim != 2 or not bool(attention_mask.all())):
        raise UnsupportedModelError(
            "padding, or a mask of your own: peers run batches of sequences of one length. Give prompts of "
            "equal length."
        )
    for keyword, what in (("softcap", "capped logits"), ("s_aux", "attention sinks")):
        if keywords.get(keyword) is not None:
            raise UnsupportedModelError(f"{keyword} ({what}): published rules are not defined for it.")
    group = query.shape[1] // key.shape[1]
    scale = keywords.get("scaling")
    call = Call(
        query,
        key.repeat_interleave(group, 1),
        query.shape[-1] ** -0.5 if scale is None else scale,
        int(module.layer_idx),  # type: ignore[arg-type]
    )
    out = attend_by_rule(rule, call, value.repeat_interleave(group, 1), count)
    return out.transpose(1, 2).contiguous(), None
