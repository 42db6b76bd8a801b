"""The executor of all peers: explicit masks in strips of rows, and the count of what is read."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.evaluation.peers.rule import Call, Rule, causal
from llama_surgery.surgery.operation import is_operated
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules, inner_model
from llama_surgery.topology.geometry import causal_pairs

#: Elements of a mask held at a time, over batch, heads, rows and keys: 256 MB as float32 logits.
STRIP_ELEMENTS = 2**26


@dataclasses.dataclass
class PairCount:
    """Pairs read and causal pairs, over batch and heads, of prefill and decode.

    A pair counts as read when its row sees it: peers execute exactly their masks.
    """

    read: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    causal: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, phase: str, read: torch.Tensor, pairs: int) -> None:
        """Count ``read``, a tensor of one number (kept on its device), of ``pairs``."""
        self.read[phase] = self.read[phase] + read if phase in self.read else read
        self.causal[phase] = self.causal.get(phase, 0) + pairs

    def densities(self) -> dict[str, float]:
        """Pairs read over causal pairs of each phase that occurred: ``prefill``, ``decode``."""
        return {phase: int(read) / self.causal[phase] for phase, read in self.read.items()}


def strips(call: Call, block: int, elements: int = STRIP_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Positions in strips of whole blocks, such that a strip's mask has at most about ``elements``."""
    batch, heads = call.queries.shape[:2]
    size = max(1, elements // (batch * heads * call.stop) // block) * block
    cuts = range((call.start // size + 1) * size, call.stop, size)
    return itertools.pairwise([call.start, *cuts, call.stop])


def attend_by_rule(
    rule: Rule, call: Call, values: torch.Tensor, count: PairCount, elements: int = STRIP_ELEMENTS
) -> torch.Tensor:
    """Attention over what a rule leaves visible, counted: (batch, heads, rows, value_dim).

    ``values`` are (batch, heads, n, value_dim); a strip's mask has at most about ``elements``.
    """
    batch, heads, rows, _ = call.queries.shape
    shared = rule.prepare(call)
    read = torch.zeros((), dtype=torch.int64, device=values.device)
    outs = []
    for first, last in strips(call, rule.block, elements):
        visible = rule.visible(call, shared, first, last) & causal(first, last, values.device)
        alike = batch * heads // (visible.shape[0] * visible.shape[1])
        read += visible.sum() * alike
        outs.append(
            F.scaled_dot_product_attention(
                call.rows(first, last),
                call.keys[:, :, :last],
                values[:, :, :last],
                attn_mask=visible,
                scale=call.scale,
            )
        )
    pairs = causal_pairs(call.start, call.stop)
    count.add("decode" if rows == 1 and call.start else "prefill", read, pairs * batch * heads)
    return torch.cat(outs, 2)


@contextlib.contextmanager
def running(model: nn.Module, rule: Rule) -> Iterator[PairCount]:
    """Let every full-attention layer of a dense model follow ``rule``; other layers stay dense.

    ``forward`` and ``generate`` work as before, with the model's own cache. Sequences of a batch must have
    one length.

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
