"""What rules learn of calibration text, in seconds: a gate on pooled blocks, which KV heads retrieve."""

import random

import torch
from torch import nn

from llama_surgery.evaluation.logits import read_windows
from llama_surgery.evaluation.peers.blocks import PooledGate, block_attention, pooled
from llama_surgery.evaluation.peers.executor import running
from llama_surgery.evaluation.peers.rule import Call, Everything, block_causal
from llama_surgery.surgery.supported import inner_model

STEPS, BATCH, LEARNING_RATE, WIDTH = 400, 4, 3e-3, 64


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


#: Tokens of a copied passage.
PASSAGE = 128


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
