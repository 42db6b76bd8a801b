"""The metric in which a layer's keys are neighbours: that of the queries which will look them up."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_surgery.checkpoint import told
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.operation import Operation
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules
from llama_surgery.topology.router import PageRouter

_log = logging.getLogger(__name__)
#: Tokens that queries are measured on. They are drawn at random: which channels are large is a matter of the
#: weights more than of the text (docs/log.md), and so no text is asked for.
TOKENS = 256

#: Of the mean, the least that a channel counts.
LEAST = 1e-3


def set_metric(model: PreTrainedModel, operation: Operation) -> None:
    """Have the layers of an operated model sort their keys in the metric of their queries.

    Where a query's channel is large, keys that differ in it get different logits. A channel counts by the
    root mean square of its queries, averaged over a KV head's group and with the rotary partner, so that the
    metric does not depend on positions. A model whose weights are not in memory (``meta`` tensors) keeps the
    keys' own metric.

    Args:
        model: The operated model, dense for as long as this takes.
        operation: Of the model.
    """
    config, layers = operation.config, operation.layers
    # Models of several streams of codes have a list of embeddings, and are given no plain tokens.
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is None or table.device.type == "meta":
        return
    weights: dict[int, torch.Tensor | None] = {}

    def hear(index: int, queries: torch.Tensor, kv_heads: int) -> None:
        weights[index] = key_weight(queries, kv_heads)

    until = -(-TOKENS // config.tile) * config.tile
    dense = dataclasses.replace(config, dense_until=until, backend="auto")
    device = table.device
    devices = [device] if device.type == "cuda" else []
    try:
        with _heard(layers, dense, hear), torch.no_grad(), torch.random.fork_rng(devices):
            model(input_ids=random_tokens(table.shape[0]).to(device), use_cache=False)
    # Whatever keeps the model from running here: it may be moved before it is used.
    except Exception as error:
        _log.warning(
            f"keys are sorted in a metric of their own, as the model could not be run: {told(error)}."
        )
        return
    for index, weight in weights.items():
        if weight is not None:
            layers[index].router = PageRouter(key_weight=weight)


def metric_of(model: PreTrainedModel, device: torch.device) -> dict[int, torch.Tensor | None]:
    """What :func:`set_metric` measures, to rounding, on a model that is dense, by layer index.

    Args:
        model: Its weights may come while it runs.
        device: Where tokens are to be.
    """
    modules, found = attention_modules(model), dict[int, torch.Tensor | None]()
    indices = {id(module): index for index, module in modules.items()}

    def attention(base: str, module: Any, query: Any, key: Any, *rest: Any, **keywords: Any) -> Any:
        found[indices[id(module)]] = key_weight(query, key.shape[1])
        return dense_attention(base, module, query, key, *rest, **keywords)

    ids = random_tokens(model.get_input_embeddings().weight.shape[0]).to(device)
    with attention_replaced(model, modules.values(), attention):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return found


def random_tokens(vocabulary: int) -> torch.Tensor:
    """What queries are measured on, the same whenever asked for: (1, ``TOKENS``) int64."""
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def key_weight(queries: torch.Tensor, kv_heads: int) -> torch.Tensor | None:
    """Weights of a layer's keys, (kv_heads, head_dim) float32, or None where queries are not finite.

    Args:
        queries: (batch, heads, rows, head_dim), those of :func:`random_tokens`.
        kv_heads: KV heads.
    """
    by_channel = queries.float().square().mean((0, 2)).unflatten(0, (kv_heads, -1)).mean(1)
    half = by_channel.shape[-1] // 2
    pairs = (by_channel[:, :half] + by_channel[:, half : 2 * half]) / 2
    square = torch.cat((pairs, pairs, by_channel[:, 2 * half :]), -1)
    square = square / square.mean(-1, keepdim=True)
    return square.clamp_min(LEAST).sqrt() if bool(square.isfinite().all()) else None


@contextlib.contextmanager
def _heard(
    layers: dict[int, LayerSurgery], config: SurgeryConfig, hear: Callable[[int, torch.Tensor, int], None]
) -> Iterator[None]:
    given = {index: layer.config for index, layer in layers.items()}
    for index, layer in layers.items():
        layer.hear_queries, layer.config = functools.partial(hear, index), config
    try:
        yield
    finally:
        for index, layer in layers.items():
            layer.hear_queries, layer.config = None, given[index]
            layer.counters.clear()
