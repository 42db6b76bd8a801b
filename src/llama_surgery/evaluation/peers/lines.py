"""Rules that read whole columns and diagonals of the attention map, chosen by the call's last rows.

As published, the last rows of a prompt choose for all its rows, so that a row may see a key that later rows
chose. Figures over given text flatter such rules. In a decode step the last rows are the row itself, whose
attention is then not guessed but known.
"""

import dataclasses
from typing import NamedTuple

import torch

from llama_surgery.evaluation.peers.rule import (
    Call,
    Rule,
    block_causal,
    block_means,
    blocks_to_tokens,
    cumulative,
    largest,
    own_block,
)


class Lines(NamedTuple):
    """Chosen columns and diagonals: (batch, heads, n) bool each, diagonals by row − key."""

    columns: torch.Tensor
    diagonals: torch.Tensor

    def visible(self, first: int, last: int) -> torch.Tensor:
        """(batch, heads, last − first, last) bool."""
        device = self.columns.device
        back = torch.arange(first, last, device=device)[:, None] - torch.arange(last, device=device)
        return self.columns[:, :, None, :last] | self.diagonals[:, :, back.clamp_min(0)]


def line_sums(weights: torch.Tensor, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention added up along columns and diagonals: by key and by row − key, (batch, heads, stop) each.

    ``weights`` are (batch, heads, rows, stop), of the rows that end at ``stop``.
    """
    rows = weights.shape[2]
    row = torch.arange(stop - rows, stop, device=weights.device)[:, None]
    key = row - torch.arange(stop, device=weights.device)
    along = weights.gather(3, key.clamp_min(0).expand_as(weights)).masked_fill(key < 0, 0)
    return weights.sum(2), along.sum(2)


@dataclasses.dataclass
class VerticalSlash(Rule):
    """The heaviest columns and diagonals of the last rows.

    Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
    Attention", 2024, arXiv:2407.02490. Of its three patterns this is the one that almost all heads are given;
    the paper searches each head's numbers of lines offline, here both are equal and the same for all heads.
    The first keys and the nearest diagonals are always read, as in the published code, whose kernel widens
    diagonals to blocks; here they are lines.

    Attributes:
        count: Columns, and diagonals, besides those always read.
        last_rows: Rows that choose.
        sinks: First columns, always read.
        near: Nearest diagonals, always read.
    """

    count: int
    last_rows: int = 64
    sinks: int = 30
    near: int = 100

    def prepare(self, call: Call) -> Lines:
        first = max(call.start, call.stop - self.last_rows)
        columns, diagonals = line_sums(call.weights(first, call.stop), call.stop)
        columns[..., : self.sinks] = diagonals[..., : self.near] = float("inf")
        return Lines(largest(columns, self.sinks + self.count), largest(diagonals, self.near + self.count))

    def visible(self, call: Call, shared: Lines, first: int, last: int) -> torch.Tensor:
        return shared.visible(first, last)


@dataclasses.dataclass
class CumulativeShare(Rule):
    """As much as a share of the attention needs, by lines or, where pooled queries predict well, by blocks.

    Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
    Inference", 2025, arXiv:2502.20766. Per head, the true attention of the last row block is compared with
    the one that mean queries and mean keys predict (Jensen-Shannon distance): if they are close, the head
    reads the heaviest predicted blocks of the whole map, else the heaviest columns and diagonals of the last
    row block, in both cases until a share is reached. The first block and a row block's own are always read;
    the paper's minimum of 1,024 keys is left out.

    Attributes:
        share: Of the attention.
        block: Rows and keys of a block.
        distance: Largest Jensen-Shannon distance of a head that reads blocks; the paper's number.
    """

    share: float
    block: int = 128
    distance: float = 0.1

    def prepare(self, call: Call) -> tuple[torch.Tensor, Lines]:
        predicted = self.predicted(call)
        first = max(call.start, (call.stop - 1) // self.block * self.block)
        last = call.weights(first, call.stop)
        mass = torch.nn.functional.pad(last.mean(2), (0, -call.stop % self.block))
        true = mass.unflatten(-1, (-1, self.block)).sum(-1)
        by_blocks = (jensen_shannon(true, predicted[:, :, -1]) < self.distance)[..., None]
        sums = line_sums(last, call.stop)
        lines = Lines(*(cumulative(part, self.share) & ~by_blocks for part in sums))
        blocks = cumulative(predicted.flatten(2), self.share) & by_blocks
        forced = own_block(call, self.block, first=True)
        return blocks.unflatten(2, predicted.shape[2:]) | forced, lines

    def predicted(self, call: Call) -> torch.Tensor:
        """Attention of mean queries to mean keys: (batch, heads, row blocks, key blocks), float32."""
        keys = block_means(call.keys.float(), 0, self.block)
        queries = block_means(call.queries.float(), call.start, self.block)
        logits = (queries @ keys.mT) * call.scale
        return logits.masked_fill(~block_causal(call, self.block), float("-inf")).softmax(-1)

    def visible(self, call: Call, shared: tuple[torch.Tensor, Lines], first: int, last: int) -> torch.Tensor:
        blocks, lines = shared
        return blocks_to_tokens(blocks, call, self.block, first, last) | lines.visible(first, last)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence, in nats, of distributions in the last dimension."""
    middle = (p + q) / 2

    def divergence(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x * (x / middle).log(), 0.0).sum(-1)

    return ((divergence(p) + divergence(q)) / 2).clamp_min(0).sqrt()
