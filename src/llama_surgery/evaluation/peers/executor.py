"""The executor of all peers: explicit masks in strips of rows, and the count of what is read."""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from llama_surgery.evaluation.peers.rule import Call, Rule, causal
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
    """Attention over what a rule leaves visible.

    Args:
        rule: Decides.
        call: Queries and keys.
        values: (batch, heads, n, value_dim).
        count: Where pairs are counted.
        elements: Size of a strip's mask.

    Returns:
        (batch, heads, rows, value_dim).
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
