"""All peers by name: how a budget becomes a rule, and what rules learn of calibration text, in seconds."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llama_surgery.evaluation.logits import read_windows
from llama_surgery.evaluation.peers.executor import running
from llama_surgery.evaluation.peers.maps import (
    Antidiagonals,
    CumulativeShare,
    HeaviestBlocks,
    PooledGate,
    VerticalSlash,
    block_attention,
    pooled,
)
from llama_surgery.evaluation.peers.rows import (
    BoundedPages,
    HeaviestTokens,
    MeanBlocks,
    RetrievalHeads,
    SinkWindow,
)
from llama_surgery.evaluation.peers.rule import Call, Everything, Rule, block_causal
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model

#: Tokens of a copied passage.
PASSAGE = 128
#: Of training a gate: steps, windows of one, and its inner width.
STEPS, BATCH, LEARNING_RATE, WIDTH = 400, 4, 3e-3, 64

#: What a rule learned from calibration text, by name.
Learned = Mapping[str, torch.Tensor]


class _Recorder(Everything):
    """Dense attention that keeps what a gate is trained on: pooled queries and keys, and the target."""

    def __init__(self, block: int) -> None:
        self.size = block
        self.kept: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def prepare(self, call: Call) -> None:
        heaviest = block_attention(call, self.size, "max")
        target = heaviest / heaviest.sum(-1, keepdim=True)
        self.kept.setdefault(call.layer, []).append((*pooled(call, self.size), target))
        self.within = block_causal(call, self.size)


def train_gate(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Trains the gates of all layers by KL to the dense attention map, max-pooled over blocks.

    The calibration text ``ids`` is (windows, length) int64; the model's weights do not change.

    Returns:
        ``query_map`` and ``key_map`` of :class:`PooledGate`, on the CPU. Layers that are not full-attention
        ones have zeros.
    """
    recorder, device = _Recorder(PooledGate.block), inner_model(model).device
    with running(model, recorder):
        read_windows(model, ids)
    layers = sorted(recorder.kept)
    # (windows, layers, heads, blocks, channels)
    queries, keys, targets = (
        torch.stack([torch.cat([window[part] for window in recorder.kept[layer]]) for layer in layers], 1)
        for part in range(3)
    )
    _, _, heads, _, dim = queries.shape
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query_map": (max(layers) + 1, heads, dim, WIDTH),
        "key_map": (max(layers) + 1, heads, 3 * dim, WIDTH),
    }
    maps = {
        name: (torch.randn(shape, generator=generator) * shape[2] ** -0.5 * WIDTH**-0.25).to(device)
        for name, shape in shapes.items()
    }
    optimiser = torch.optim.Adam([weights.requires_grad_() for weights in maps.values()], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            batch = torch.randint(len(ids), (min(BATCH, len(ids)),), generator=generator).to(device)
            query_map, key_map = (maps[name][layers] for name in ("query_map", "key_map"))
            scores = (queries[batch] @ query_map) @ (keys[batch] @ key_map).mT
            log_gate = scores.masked_fill(~recorder.within, float("-inf")).log_softmax(-1)
            log_gate = log_gate.masked_fill(~recorder.within, 0)
            loss = -(targets[batch] * log_gate).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return {name: weights.detach().cpu() for name, weights in maps.items()}


class _CopyRecorder(Everything):
    """Dense attention that adds up, for each head, the attention of the copy's rows to their sources."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.source = 0
        self.sums: dict[int, torch.Tensor] = {}

    def prepare(self, call: Call) -> None:
        weights = call.weights(call.stop - PASSAGE, call.stop)
        # The token to be written next stands one behind the row's own source.
        key = torch.arange(self.source + 1, self.source + 1 + PASSAGE, device=weights.device)
        score = weights.gather(3, key[:, None].expand(*weights.shape[:3], 1)).mean((0, 2, 3))
        score = score.unflatten(0, (-1, self.group)).amax(1)
        self.sums[call.layer] = self.sums.get(call.layer, 0) + score


def retrieval_scores(model: nn.Module, ids: torch.Tensor, kv_heads: int) -> dict[str, torch.Tensor]:
    """Mean attention of a copied passage's rows to the tokens they should write next, by KV head.

    The last tokens of every window become a copy of an earlier passage. The score is that of Wu et al.,
    "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv:2404.15574, with attention
    mass in place of a count; a group has the score of its best query head. ``ids`` are (windows, length)
    int64, calibration text, more than four passages long.

    Returns:
        ``scores``: (layers, kv_heads) float32, on the CPU; 1 at layers that are not full-attention ones.
    """
    inner = inner_model(model)
    heads = inner.config.get_text_config().num_attention_heads
    recorder = _CopyRecorder(heads // kv_heads)
    rng = random.Random(0)
    with running(model, recorder):
        for window in ids:
            recorder.source = rng.randrange(len(window) - 3 * PASSAGE)
            copied = window[recorder.source : recorder.source + PASSAGE]
            read_windows(model, torch.cat([window[:-PASSAGE], copied])[None])
    scores = torch.ones(max(recorder.sums) + 1, kv_heads)
    for layer, total in recorder.sums.items():
        scores[layer] = (total / len(ids)).cpu()
    return {"scores": scores}


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
