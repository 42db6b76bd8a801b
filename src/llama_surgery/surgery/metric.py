"""The metric in which a layer's keys are neighbours: that of the queries which will look them up."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_surgery.checkpoint import told
from llama_surgery.surgery.calls import untraced
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules

_log = logging.getLogger(__name__)
#: Tokens that queries are measured on. They are drawn at random: which channels are large is a matter of the
#: weights more than of the text (docs/log.md), and so no text is asked for.
TOKENS = 256

#: Of the mean, the least that a channel counts.
LEAST = 1e-3


def metric_of(
    model: PreTrainedModel, run: Callable[[torch.Tensor], Any] | None = None
) -> dict[int, torch.Tensor]:
    """Weights of the keys of every layer, (kv_heads, head_dim) float32, by layer index.

    Where a query's channel is large, keys that differ in it get different logits. A channel counts by the
    root mean square of its queries, averaged over a KV head's group and with the channel half a head away.
    That is its rotary partner, so that the metric does not depend on positions, in models that rotate whole
    heads by halves, as Llama, Mistral, Qwen and Gemma do; in others the metric is a coarser one. There is
    none, and keys are sorted in their own, where the model's weights are not in memory (``meta`` tensors) or
    it cannot be run.

    Args:
        model: A dense model, which runs once on ``TOKENS`` tokens.
        run: Runs it on tokens (1, ``TOKENS``) int64, where its weights come while it runs.
    """
    # Models of several streams of codes have a list of embeddings, and are given no plain tokens.
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is None or (table.device.type == "meta" and run is None):
        return {}
    modules, found = attention_modules(model), dict[int, torch.Tensor]()

    @untraced
    def attention(base: str, module: Any, query: Any, key: Any, *rest: Any, **keywords: Any) -> Any:
        weight = _key_weight(query, key.shape[1])
        if weight is not None:
            found[module.layer_idx] = weight
        return dense_attention(base, module, query, key, *rest, **keywords)

    ids = torch.randint(table.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0))
    devices = [table.device] if table.device.type == "cuda" else []
    try:
        with (
            attention_replaced(model, modules.values(), attention),
            torch.no_grad(),
            torch.random.fork_rng(devices),
        ):
            if run is None:
                model(input_ids=ids.to(table.device), use_cache=False)
            else:
                run(ids)
    # Whatever keeps the model from running here: it may be moved before it is used.
    except Exception as error:
        _log.warning(
            f"keys are sorted in a metric of their own, as the model could not be run: {told(error)}."
        )
        return {}
    return found


def _key_weight(queries: torch.Tensor, kv_heads: int) -> torch.Tensor | None:
    """Weights of a layer's keys, or None where its queries (batch, heads, rows, head_dim) are not finite."""
    by_channel = queries.float().square().mean((0, 2)).unflatten(0, (kv_heads, -1)).mean(1)
    half = by_channel.shape[-1] // 2
    pairs = (by_channel[:, :half] + by_channel[:, half : 2 * half]) / 2
    square = torch.cat((pairs, pairs, by_channel[:, 2 * half :]), -1)
    square = square / square.mean(-1, keepdim=True)
    return square.clamp_min(LEAST).sqrt() if bool(square.isfinite().all()) else None
