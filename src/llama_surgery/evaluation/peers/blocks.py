"""Rules that choose square blocks of the attention map, for all rows of a block together.

As published, a row may see a key that was chosen because of later rows of its block. Figures over given text
flatter such rules; generation, one row at a time, does not.
"""

import dataclasses

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
    is pooled carries the model's. Trained by :func:`~llama_surgery.evaluation.peers.learned.train_gate`.

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
