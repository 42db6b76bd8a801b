"""Rules by which every row chooses for itself, by scores or by positions alone."""

import dataclasses
from typing import Any

import torch

from llama_surgery.evaluation.peers.rule import Call, Rule, block_means, largest, pad_to_blocks


@dataclasses.dataclass
class MeanBlocks(Rule):
    """Blocks whose mean key a row's query likes best, its own block always.

    Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arXiv:2502.13189. The paper
    trains the model with the rule; here it meets a dense model. Blocks are smaller than the paper's 512 so
    that low densities exist.

    Attributes:
        count: Blocks of a row, its own included.
        keys_per_block: Keys of a block.
    """

    count: int
    keys_per_block: int = 64

    def prepare(self, call: Call) -> torch.Tensor:
        return block_means(call.keys, 0, self.keys_per_block)

    def visible(self, call: Call, shared: torch.Tensor, first: int, last: int) -> torch.Tensor:
        scores = call.rows(first, last) @ shared.mT
        return _with_own(scores, self.count - 1, self.keys_per_block, first, last)


@dataclasses.dataclass
class BoundedPages(Rule):
    """Pages by the largest q·k that any key within their per-channel minimum and maximum could have.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024,
    arXiv:2406.10774. Quest is defined for decode steps, after a dense prefill; here every row is chosen for
    as its decode step would be, in prefill too. The paper leaves its first two layers dense; here all are
    sparse, since two of a small model's few layers would be most of the budget.

    Attributes:
        count: Pages of a row, its own included.
        keys_per_page: Keys of a page; the paper's number.
    """

    count: int
    keys_per_page: int = 16

    def prepare(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        # The last page may be incomplete, but rows that could see it score it as their own alone.
        pages = pad_to_blocks(call.keys, 0, self.keys_per_page)
        return pages.amin(3), pages.amax(3)

    def visible(
        self, call: Call, shared: tuple[torch.Tensor, torch.Tensor], first: int, last: int
    ) -> torch.Tensor:
        low, high = shared
        queries = call.rows(first, last)
        bound = queries.clamp_min(0) @ high.mT + queries.clamp_max(0) @ low.mT
        return _with_own(bound, self.count - 1, self.keys_per_page, first, last)


@dataclasses.dataclass
class HeaviestTokens(Rule):
    """The keys that get most of a row's true attention: what no rule that must guess can know.

    Attributes:
        count: Keys of a row.
    """

    count: int

    def visible(self, call: Call, shared: None, first: int, last: int) -> torch.Tensor:
        logits = call.logits(first, last)
        if self.count >= last:
            return torch.ones_like(logits, dtype=torch.bool)
        least = logits.kthvalue(last - self.count + 1, dim=-1, keepdim=True).values
        return logits >= least


def _with_own(scores: torch.Tensor, count: int, size: int, first: int, last: int) -> torch.Tensor:
    """The best blocks that lie before each row's own, and that: (batch, heads, last − first, last) bool."""
    blocks = (last - 1) // size + 1
    block = torch.arange(blocks, device=scores.device)
    own = torch.arange(first, last, device=scores.device)[:, None] // size
    scores = scores[..., :blocks].masked_fill(block >= own, float("-inf"))
    chosen = largest(scores, count) | (block == own)
    return chosen.repeat_interleave(size, -1)[..., :last]


@dataclasses.dataclass
class SinkWindow(Rule):
    """The first keys and the most recent ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453. Positions
    stay those of the text: the published cache numbers its entries anew so that texts may exceed the model's
    context, which no text does here.

    Attributes:
        window: Recent keys, the row's own among them.
        sinks: First keys; the paper's number.
    """

    window: int
    sinks: int = 4

    def visible(self, call: Call, shared: Any, first: int, last: int) -> torch.Tensor:
        key = torch.arange(last, device=call.keys.device)
        row = torch.arange(first, last, device=call.keys.device)[:, None]
        return ((key < self.sinks) | (key > row - self.window))[None, None]


@dataclasses.dataclass
class RetrievalHeads(Rule):
    """KV heads that retrieve see everything, all others sinks and a window.

    Xiao et al., "DuoAttention", 2024, arXiv:2410.10819. The paper learns a gate for each KV head from the
    output error on planted passkeys; here heads are ranked by a retrieval score measured in seconds
    (:func:`~llama_surgery.evaluation.peers.registry.retrieval_scores`).

    Attributes:
        heads: (layers, kv_heads) bool, those that see everything.
        window: Recent keys of the others.
        sinks: First keys of the others.
    """

    heads: torch.Tensor
    window: int = 256
    sinks: int = 64

    def visible(self, call: Call, shared: Any, first: int, last: int) -> torch.Tensor:
        streaming = SinkWindow(self.window, self.sinks).visible(call, shared, first, last)
        full = self.heads[call.layer].to(streaming.device)
        full = full.repeat_interleave(call.queries.shape[1] // len(full))
        return streaming | full[None, :, None, None]
