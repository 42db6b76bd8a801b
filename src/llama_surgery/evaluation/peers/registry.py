"""All peers by name: how a budget becomes a rule."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llama_surgery.evaluation.peers.blocks import Antidiagonals, HeaviestBlocks, PooledGate
from llama_surgery.evaluation.peers.fixed import RetrievalHeads, SinkWindow
from llama_surgery.evaluation.peers.gate import train_gate
from llama_surgery.evaluation.peers.lines import CumulativeShare, VerticalSlash
from llama_surgery.evaluation.peers.retrieval import retrieval_scores
from llama_surgery.evaluation.peers.rows import BoundedPages, HeaviestTokens, MeanBlocks
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


def _count(least: int, size: int = 1) -> Callable[[float, int, Learned], float]:
    """Counts of things of ``size`` keys, from ``least`` to all of them, in equal ratios."""

    def number(x: float, length: int, learned: Learned) -> float:
        most = -(-length // size)
        return most if x >= 1 else min(most, round(least * (most / least) ** x))

    return number


def _share(x: float, length: int, learned: Learned) -> float:
    """Shares from 0 to 1, finer towards 1, where heavy-tailed attention needs it."""
    return 1 - (1 - x) ** 3


def _heads(x: float, length: int, learned: Learned) -> float:
    return round(x * learned["scores"].numel())


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


def _gate(number: float, learned: Learned) -> Rule:
    return PooledGate(int(number), learned["query_map"], learned["key_map"])


def _counted(rule: Any) -> Callable[[float, Learned], Rule]:
    return lambda number, learned: rule(int(number))


#: In order of tables.
PEERS = {
    "streaming": Peer("sink + window (StreamingLLM)", "window", _count(16), lambda n, _: SinkWindow(int(n))),
    "moba": Peer(
        "mean-pooled blocks (MoBA)", "blocks", _count(1, MeanBlocks.keys_per_block), _counted(MeanBlocks)
    ),
    "quest": Peer(
        "page bounds (Quest)", "pages", _count(1, BoundedPages.keys_per_page), _counted(BoundedPages)
    ),
    "xattention": Peer(
        "antidiagonals (XAttention)", "share", _share, lambda n, _: Antidiagonals(n), ahead=True
    ),
    "minference": Peer(
        "vertical-slash (MInference)", "lines", _count(1), _counted(VerticalSlash), ahead=True
    ),
    "flexprefill": Peer(
        "cumulative share (FlexPrefill)", "share", _share, lambda n, _: CumulativeShare(n), ahead=True
    ),
    "seer": Peer(
        "learned pooled gate (SeerAttention)",
        "blocks",
        _count(1, PooledGate.block),
        _gate,
        learn=train_gate,
        ahead=True,
    ),
    "duo": Peer("retrieval heads (DuoAttention)", "heads", _heads, _retrieval, learn=_learn_heads),
    "block-oracle": Peer(
        "oracle: blocks by true mass",
        "blocks",
        _count(1, HeaviestBlocks.block),
        _counted(HeaviestBlocks),
        ahead=True,
    ),
    "token-oracle": Peer("oracle: tokens by true mass", "keys", _count(1), _counted(HeaviestTokens)),
    # What the peers' executor itself costs.
    "full": Peer("full budget, peers' executor", "", lambda *_: 1, lambda *_: Everything()),
}
