"""The metric in which a layer's keys are neighbours: that of the queries which will look them up."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from llama_surgery.checkpoint import told
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.operation import Operation
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
    config, layers, embedded = operation.config, operation.layers, model.get_input_embeddings()
    if embedded is None or embedded.weight.device.type == "meta":
        return
    squares: dict[int, torch.Tensor] = {}

    def hear(index: int, queries: torch.Tensor, kv_heads: int) -> None:
        by_channel = queries.float().square().mean((0, 2)).unflatten(0, (kv_heads, -1)).mean(1)
        half = by_channel.shape[-1] // 2
        pairs = (by_channel[:, :half] + by_channel[:, half : 2 * half]) / 2
        squares[index] = torch.cat((pairs, pairs, by_channel[:, 2 * half :]), -1)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedded.weight.shape[0], (1, TOKENS), generator=generator)
    until = -(-TOKENS // config.tile) * config.tile
    dense = dataclasses.replace(config, dense_until=until, backend="auto")
    device = embedded.weight.device
    devices = [device] if device.type == "cuda" else []
    try:
        with _heard(layers, dense, hear), torch.no_grad(), torch.random.fork_rng(devices):
            model(input_ids=ids.to(device), use_cache=False)
    # Whatever keeps the model from running here: it may be moved before it is used.
    except Exception as error:
        _log.warning(
            f"keys are sorted in a metric of their own, as the model could not be run: {told(error)}."
        )
        return
    for index, square in squares.items():
        square = square / square.mean(-1, keepdim=True)
        if square.isfinite().all():
            layers[index].router = PageRouter(key_weight=square.clamp_min(LEAST).sqrt())


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
