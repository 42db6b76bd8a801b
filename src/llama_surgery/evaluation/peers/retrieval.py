"""Which KV heads retrieve: attention of a copied passage to what it was copied from."""

import random

import torch
from torch import nn

from llama_surgery.evaluation.peers.attach import running
from llama_surgery.evaluation.peers.rule import Call, Everything
from llama_surgery.surgery.supported import inner_model

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
    mass in place of a count; a group has the score of its best query head.

    Args:
        model: A dense causal language model of transformers.
        ids: (windows, length) int64, calibration text, more than four passages long.
        kv_heads: KV heads of a layer.

    Returns:
        ``scores``: (layers, kv_heads) float32, on the CPU; 1 at layers that are not full-attention ones.
    """
    inner = inner_model(model)
    heads = inner.config.get_text_config().num_attention_heads
    recorder = _CopyRecorder(heads // kv_heads)
    rng = random.Random(0)
    with torch.no_grad(), running(model, recorder):
        for window in ids:
            recorder.source = rng.randrange(len(window) - 3 * PASSAGE)
            copied = window[recorder.source : recorder.source + PASSAGE]
            copy = torch.cat([window[:-PASSAGE], copied])
            model(input_ids=copy[None].to(inner.device), use_cache=False, logits_to_keep=1)
    scores = torch.ones(max(recorder.sums) + 1, kv_heads)
    for layer, total in recorder.sums.items():
        scores[layer] = (total / len(ids)).cpu()
    return {"scores": scores}
