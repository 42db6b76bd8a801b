"""Rules that look at positions alone."""

import dataclasses
from typing import Any

import torch

from llama_surgery.evaluation.peers.rule import Call, Rule


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
    (:func:`~llama_surgery.evaluation.peers.retrieval.retrieval_scores`).

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
