"""Training the pooled gate, in seconds."""

import torch
from torch import nn

from llama_surgery.evaluation.peers.attach import running
from llama_surgery.evaluation.peers.blocks import PooledGate, block_attention, pooled
from llama_surgery.evaluation.peers.rule import Call, Everything, block_causal
from llama_surgery.surgery.supported import inner_model

STEPS, BATCH, LEARNING_RATE, WIDTH = 400, 4, 3e-3, 64


class _Recorder(Everything):
    """Dense attention that keeps what a gate is trained on: pooled queries and keys, and the target."""

    def __init__(self, block: int) -> None:
        self.size = block
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, list[torch.Tensor]] = {}
        self.targets: dict[int, list[torch.Tensor]] = {}

    def prepare(self, call: Call) -> None:
        queries, keys = pooled(call, self.size)
        heaviest = block_attention(call, self.size, "max")
        self.queries.setdefault(call.layer, []).append(queries)
        self.keys.setdefault(call.layer, []).append(keys)
        self.targets.setdefault(call.layer, []).append(heaviest / heaviest.sum(-1, keepdim=True))
        self.within = block_causal(call, self.size)


def train_gate(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Trains the gates of all layers by KL to the dense attention map, max-pooled over blocks.

    Args:
        model: A dense causal language model of transformers; its weights do not change.
        ids: (windows, length) int64, calibration text.

    Returns:
        ``query_map`` and ``key_map`` of :class:`PooledGate`, on the CPU. Layers that are not full-attention
        ones have zeros.
    """
    recorder = _Recorder(PooledGate.block)
    device = inner_model(model).device
    with torch.no_grad(), running(model, recorder):
        for window in ids:
            model(input_ids=window[None].to(device), use_cache=False, logits_to_keep=1)
    layers = sorted(recorder.queries)
    # (windows, layers, heads, blocks, channels)
    queries, keys, targets = (
        torch.stack([torch.cat(kept[layer]) for layer in layers], 1)
        for kept in (recorder.queries, recorder.keys, recorder.targets)
    )
    _, _, heads, _, dim = queries.shape
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query_map": (max(layers) + 1, heads, dim, WIDTH),
        "key_map": (max(layers) + 1, heads, 3 * dim, WIDTH),
    }
    maps = {
        name: (torch.randn(shape, generator=generator) * shape[2] ** -0.5 * WIDTH**-0.25)
        .to(device)
        .requires_grad_()
        for name, shape in shapes.items()
    }
    optimiser = torch.optim.Adam(maps.values(), LEARNING_RATE)
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
