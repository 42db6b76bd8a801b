"""All peers by name: how a budget becomes a rule."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llama_surgery.evaluation.peers.blocks import Antidiagonals, HeaviestBlocks, PooledGate
from llama_surgery.evaluation.peers.learned import retrieval_scores, train_gate
from llama_surgery.evaluation.peers.lines import CumulativeShare, VerticalSlash
from llama_surgery.evaluation.peers.rows import (
    BoundedPages,
    HeaviestTokens,
    MeanBlocks,
    RetrievalHeads,
    SinkWindow,
)
from llama_surgery.evaluation.peers.rule import Everything, Rule
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model

#: What a rule learned from calibration text, by name.
Learned = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A published rule, or an oracle, with its own knob.

    Attributes:
        title: For tables and figures.
        knob: What the rule's number is called.
        number: The knob for a budget x in 0…1 (0 the rule's floor, 1 everything) at a length in tokens.
            Density never falls as x grows.
        make: The rule of a knob's value.
        learn: Takes the model and calibration windows (windows, length) and returns what the rule needs.
        ahead: Whether, as published, a row of a prompt may see keys that later rows chose.
    """

    title: str
    knob: str
    number: Callable[[float, int, Learned], float]
    make: Callable[[float, Learned], Rule]
    learn: Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]] | None = None
    ahead: bool = False


def _counted(
    title: str, knob: str, rule: Callable[..., Rule], size: int = 1, least: int = 1, **more: Any
) -> Peer:
    """A rule of so many things of ``size`` keys: from ``least`` to all of them, in equal ratios."""

    def number(x: float, length: int, learned: Learned) -> float:
        most = -(-length // size)
        return most if x >= 1 else min(most, round(least * (most / least) ** x))

    return Peer(title, knob, number, lambda n, learned: rule(int(n), **learned), **more)


def _shared(title: str, rule: Callable[[float], Rule]) -> Peer:
    """A rule of a share, 0 to 1, finer towards 1, where heavy-tailed attention needs it; it looks ahead."""
    return Peer(title, "share", lambda x, *_: 1 - (1 - x) ** 3, lambda share, _: rule(share), ahead=True)


def _retrieval(number: float, learned: Learned) -> Rule:
    scores = learned["scores"]
    rank = scores.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[rank[: int(number)]] = True
    return RetrievalHeads(chosen.view_as(scores))


def _learn_heads(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    inner = inner_model(model)
    kv_heads, _, _ = head_shape(inner, next(iter(attention_modules(inner).values())))
    return retrieval_scores(model, ids, kv_heads)


#: In order of tables.
PEERS = {
    "streaming": _counted("sink + window (StreamingLLM)", "window", SinkWindow, least=16),
    "moba": _counted("mean-pooled blocks (MoBA)", "blocks", MeanBlocks, MeanBlocks.keys_per_block),
    "quest": _counted("page bounds (Quest)", "pages", BoundedPages, BoundedPages.keys_per_page),
    "xattention": _shared("antidiagonals (XAttention)", Antidiagonals),
    "minference": _counted("vertical-slash (MInference)", "lines", VerticalSlash, ahead=True),
    "flexprefill": _shared("cumulative share (FlexPrefill)", CumulativeShare),
    "seer": _counted(
        "learned pooled gate (SeerAttention)",
        "blocks",
        PooledGate,
        PooledGate.block,
        learn=train_gate,
        ahead=True,
    ),
    "duo": Peer(
        "retrieval heads (DuoAttention)",
        "heads",
        lambda x, _, learned: round(x * learned["scores"].numel()),
        _retrieval,
        learn=_learn_heads,
    ),
    "block-oracle": _counted(
        "oracle: blocks by true mass", "blocks", HeaviestBlocks, HeaviestBlocks.block, ahead=True
    ),
    "token-oracle": _counted("oracle: tokens by true mass", "keys", HeaviestTokens),
    # What the peers' executor itself costs.
    "full": Peer("full budget, peers' executor", "", lambda *_: 1, lambda *_: Everything()),
}
