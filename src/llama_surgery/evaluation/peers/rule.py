"""What a selection rule is, and the few operations that published rules are made of."""

import abc
import dataclasses
from typing import Any

import torch
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Call:
    """Queries and keys of one call of one attention layer.

    Attributes:
        queries: (batch, heads, rows, head_dim), rotary embedding applied.
        keys: (batch, heads, n, head_dim), all keys so far, repeated for the heads of a group; the last
            ``rows`` are the rows' own.
        scale: Scaling of q·k.
        layer: Index of the layer.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scale: float
    layer: int

    @property
    def stop(self) -> int:
        """One past the last row's position."""
        return self.keys.shape[2]

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.stop - self.queries.shape[2]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Queries of the positions ``first … last - 1``."""
        return self.queries[:, :, first - self.start : last - self.start]

    def weights(self, first: int, last: int) -> torch.Tensor:
        """Dense attention of the positions ``first … last - 1``: (batch, heads, rows, last), float32."""
        return self.logits(first, last).softmax(-1)

    def logits(self, first: int, last: int) -> torch.Tensor:
        """Logits behind :meth:`weights`, −inf above the diagonal."""
        scores = self.rows(first, last) @ self.keys[:, :, :last].mT
        scores = scores.float().mul_(self.scale)
        return scores.masked_fill_(~causal(first, last, scores.device), float("-inf"))


class Rule(abc.ABC):
    """Which keys a row may see, as published.

    A rule sees the keys of one call and nothing else: the same rule serves prefill and decode, where a call
    has a single row. Causality is the executor's: whatever a rule returns beyond a row's position is dropped,
    neither seen nor counted.

    Attributes:
        block: Rows that are chosen for together, anchored at its multiples. A decode step has one row.
    """

    block: int = 1

    def prepare(self, call: Call) -> Any:
        """What all rows of a call share; handed to :meth:`visible`."""
        return None

    @abc.abstractmethod
    def visible(self, call: Call, shared: Any, first: int, last: int) -> torch.Tensor:
        """Which keys the rows ``first … last - 1`` read.

        Args:
            call: The call.
            shared: From :meth:`prepare`.
            first: A multiple of :attr:`block`, or the call's first row.
            last: A multiple of :attr:`block`, or the call's end.

        Returns:
            bool, broadcastable to (batch, heads, last − first, last). Every row sees itself.
        """


class Everything(Rule):
    """All keys: dense attention, run by the peers' executor. The full budget of every rule."""

    def visible(self, call: Call, shared: Any, first: int, last: int) -> torch.Tensor:
        return torch.ones(1, 1, 1, last, dtype=torch.bool, device=call.keys.device)


def causal(first: int, last: int, device: torch.device) -> torch.Tensor:
    """(last − first, last) bool: keys up to each row."""
    return torch.arange(last, device=device) <= torch.arange(first, last, device=device)[:, None]


def pad_to_blocks(x: torch.Tensor, start: int, block: int) -> torch.Tensor:
    """Rows in blocks anchored at multiples of ``block``, zeros where the first and the last are incomplete.

    ``x`` is (batch, heads, rows, channels), its first row at position ``start``; the result (batch, heads,
    blocks, block, channels).
    """
    before = start % block
    after = -(before + x.shape[2]) % block
    return functional.pad(x, (0, 0, before, after)).unflatten(2, (-1, block))


def block_means(x: torch.Tensor, start: int, block: int) -> torch.Tensor:
    """Mean of each block's rows: (batch, heads, blocks, channels). Arguments of :func:`pad_to_blocks`."""
    there = pad_to_blocks(torch.ones_like(x[:1, :1, :, :1]), start, block).sum(3)
    return pad_to_blocks(x, start, block).sum(3) / there


def tiles(weights: torch.Tensor, start: int, block: int, stop: int) -> torch.Tensor:
    """A map of rows from ``start`` on and keys from 0 on in square blocks, padded with zeros up to ``stop``.

    From (batch, heads, rows, keys) to (batch, heads, row blocks, block, key blocks, block).
    """
    keys = functional.pad(weights, (0, stop - weights.shape[3] + -stop % block))
    return pad_to_blocks(keys, start, block).unflatten(4, (-1, block))


def block_causal(call: Call, block: int) -> torch.Tensor:
    """(row blocks, key blocks) bool: key blocks up to each row block's own."""
    keys = torch.arange(-(-call.stop // block), device=call.keys.device)
    return keys <= keys[call.start // block :, None]


def own_block(call: Call, block: int, *, first: bool = False) -> torch.Tensor:
    """(row blocks, key blocks) bool: each row block's own key block, and with ``first`` the first one."""
    keys = torch.arange(-(-call.stop // block), device=call.keys.device)
    return (keys == keys[call.start // block :, None]) | (first & (keys == 0))


def blocks_to_tokens(chosen: torch.Tensor, call: Call, block: int, first: int, last: int) -> torch.Tensor:
    """Rows ``first … last - 1`` of a choice of blocks: (batch, heads, last − first, last) bool.

    ``chosen`` is (batch, heads, row blocks, key blocks) bool, for all rows of the call.
    """
    origin = call.start // block
    chosen = chosen[:, :, first // block - origin : (last - 1) // block + 1 - origin]
    keys = chosen.repeat_interleave(block, -1)[..., :last]
    offset = first % block
    return keys.repeat_interleave(block, 2)[:, :, offset : offset + last - first]


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of the last dimension, as bool; −inf is never chosen."""
    count = min(count, scores.shape[-1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if count > 0:
        chosen.scatter_(-1, scores.topk(count, sorted=False).indices, True)
    return chosen & (scores > float("-inf"))


def cumulative(weights: torch.Tensor, share: float, forced: torch.Tensor | None = None) -> torch.Tensor:
    """The fewest of the last dimension that add up to ``share`` of the sum, the heaviest first, as bool.

    ``weights`` are not negative; what is ``forced`` (bool, broadcastable) is chosen in any case, and counted
    first; at a share of 1 everything is chosen.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    rank = weights if forced is None else weights.masked_fill(forced, float("inf"))
    order = rank.argsort(-1, descending=True)
    heaviest = weights.gather(-1, order)
    before = heaviest.cumsum(-1) - heaviest
    enough = before < share * weights.sum(-1, keepdim=True)
    chosen = torch.zeros_like(enough).scatter(-1, order, enough)
    return chosen if forced is None else chosen | forced
