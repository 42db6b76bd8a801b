"""Rules that choose square blocks of the attention map, for all rows of a block together.

As published, a row may see a key that was chosen because of later rows of its block. Figures over given text
flatter such rules; generation, one row at a time, does not.
"""

import dataclasses
from typing import NamedTuple

import torch

from llama_surgery.evaluation.peers.executor import strips
from llama_surgery.evaluation.peers.rule import (
    Call,
    Rule,
    block_causal,
    block_means,
    blocks_to_tokens,
    cumulative,
    largest,
    own_block,
    pad_to_blocks,
    tiles,
)


class BlockRule(Rule):
    """A rule whose :meth:`prepare` names key blocks: (batch, heads, row blocks, key blocks) bool."""

    def visible(self, call: Call, shared: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return blocks_to_tokens(shared, call, self.block, first, last)


@dataclasses.dataclass
class Antidiagonals(BlockRule):
    """Blocks by sums along antidiagonals, as many as a share of the estimated attention needs.

    Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025, arXiv:2503.16428. In
    every stride × stride square the keys on the antidiagonal stand for all; the sums are the logits of a
    softmax at stride resolution, added up over blocks. The first block and a block's own are always read.

    Attributes:
        share: Of a row block's estimated attention.
        block: Rows and keys of a block.
        stride: Side of a square.
    """

    share: float
    block: int = 128
    stride: int = 8

    def prepare(self, call: Call) -> torch.Tensor:
        weights = self.squares(call).softmax(-1)
        per, stop = self.block // self.stride, -(-call.stop // self.stride)
        mass = tiles(weights, call.start // self.stride, per, stop).sum((3, 5))
        return cumulative(mass, self.share, own_block(call, self.block, first=True))

    def squares(self, call: Call) -> torch.Tensor:
        """Logits of squares: (batch, heads, row squares, key squares), float32."""
        rows = pad_to_blocks(call.queries, call.start, self.stride)
        keys = pad_to_blocks(call.keys, 0, self.stride).flip(3)
        # A single row of a decode step meets one key of every square, not as many as a square has rows.
        held = pad_to_blocks(torch.ones_like(call.queries[:1, :1, :, :1]), call.start, self.stride).sum(3)
        logits = (rows.flatten(3) @ keys.flatten(3).mT).float() * call.scale / held
        return logits.masked_fill(~block_causal(call, self.stride), float("-inf"))


@dataclasses.dataclass
class PooledGate(BlockRule):
    """Blocks by a learned gate on pooled queries and pooled keys.

    Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", 2024, arXiv:2410.13276.
    Queries are pooled by their mean, keys by mean, maximum and minimum, as the paper found best; linear maps
    of both are multiplied. The paper pools before the rotary embedding and applies one of its own; here what
    is pooled carries the model's. Trained by :func:`~llama_surgery.evaluation.peers.registry.train_gate`.

    Attributes:
        count: Key blocks of a row block, its own included.
        query_map: (layers, heads, head_dim, width).
        key_map: (layers, heads, 3 · head_dim, width).
        block: Rows and keys of a block; the paper's number.
    """

    count: int
    query_map: torch.Tensor
    key_map: torch.Tensor
    block: int = 64

    def prepare(self, call: Call) -> torch.Tensor:
        queries, keys = pooled(call, self.block)
        gated = queries @ self.query_map[call.layer].to(queries.device)
        scores = gated @ (keys @ self.key_map[call.layer].to(keys.device)).mT
        return _best_and_own(scores, self.count, call, self.block)


@dataclasses.dataclass
class HeaviestBlocks(BlockRule):
    """The key blocks that get most of a row block's true attention: what block rules try to guess.

    Attributes:
        count: Key blocks of a row block, its own included.
        block: Rows and keys of a block.
    """

    count: int
    block: int = 64

    def prepare(self, call: Call) -> torch.Tensor:
        return _best_and_own(block_attention(call, self.block, "sum"), self.count, call, self.block)


def _best_and_own(scores: torch.Tensor, count: int, call: Call, block: int) -> torch.Tensor:
    own = own_block(call, block)
    others = block_causal(call, block) & ~own
    return largest(scores.masked_fill(~others, float("-inf")), count - 1) | own


def pooled(call: Call, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled queries (batch, heads, row blocks, head_dim) and keys (…, key blocks, 3 · head_dim), float32."""
    queries = block_means(call.queries.float(), call.start, block)
    keys = call.keys.float()
    spread = pad_to_blocks(keys, 0, block)
    # The last block may be incomplete, but only its own rows may see it, and they do in any case.
    return queries, torch.cat([block_means(keys, 0, block), spread.amax(3), spread.amin(3)], -1)


def block_attention(call: Call, block: int, how: str) -> torch.Tensor:
    """Dense attention pooled over blocks by ``sum`` or ``max``: (batch, heads, row blocks, key blocks)."""
    parts = []
    for first, last in strips(call, block):
        pooled = tiles(call.weights(first, last), first, block, call.stop)
        parts.append(pooled.sum((3, 5)) if how == "sum" else pooled.amax((3, 5)))
    return torch.cat(parts, 2)


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
