"""Running an operated model over a text and keeping what every layer saw."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.evaluate import model_name
from llama_surgery.export.topology import Topology, layer_topology
from llama_surgery.surgery.cache import PagedLayer
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import config_of, paged_cache, set_config, surgery_of
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.statistics import Counters
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.plan import Plan


class _Recorder(Counters):
    """Counters that keep the plans, too."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[Plan] = []

    def add(self, result: AttentionResult, kv_heads: int, config: SurgeryConfig, part: Part) -> None:
        super().add(result, kv_heads, config, part)
        for plan in result.plans:
            assert isinstance(plan, Plan)  # kernels, which keep plans in another form, are turned off
            pages, first_open, counts = (x.cpu() for x in (plan.pages, plan.first_open, plan.counts))
            self.plans.append(dataclasses.replace(plan, pages=pages, first_open=first_open, counts=counts))


@contextmanager
def _recording(model: torch.nn.Module) -> Iterator[dict[int, _Recorder]]:
    """Recorders in the place of the layers' counters, and plans as lists of pages whatever the backend."""
    layers, config = surgery_of(model), config_of(model)
    if config.topology != "pages":
        raise SurgeryError(f"topology={config.topology!r} has no plans: only those of 'pages' are recorded.")
    counters = {index: layer.counters for index, layer in layers.items()}
    recorders = {index: _Recorder() for index in layers}
    if config.backend in ("auto", "triton"):
        set_config(model, dataclasses.replace(config, backend="gather"))
    try:
        for index, layer in layers.items():
            layer.counters = {config.tile: recorders[index]}
        yield recorders
    finally:
        for index, layer in layers.items():
            layer.counters = counters[index]
        set_config(model, config)


@torch.inference_mode()
def record_topology(model: torch.nn.Module, input_ids: torch.Tensor) -> Topology:
    """What every operated layer sees of a text that is read in one piece.

    Args:
        model: An operated model. Its statistics stay as they are.
        input_ids: (length,), int64.

    Raises:
        SurgeryError: The model is not operated.
        TextError: There is no token.
    """
    config, inner, length = config_of(model), inner_model(model), len(input_ids)
    if not length:
        raise TextError("the text holds no token: give some text.")
    with _recording(model) as recorders:
        cache = paged_cache(model)
        inner(input_ids[None].to(inner.device), use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    closed = closed_chunks(length - 1, config, config.tile)
    modules, layers = attention_modules(inner), {}
    for index, recorder in recorders.items():
        kv_heads, group, _ = head_shape(inner, modules[index])
        order = torch.empty(kv_heads, 0, config.chunk_size, dtype=torch.int64)
        paged = cache.layers[index]
        layout = paged.stores[0].layout if isinstance(paged, PagedLayer) else None
        if closed and layout is not None:
            order = layout.order[:, :closed].cpu().long()
        layers[index] = layer_topology(recorder.plans, order, group, length, config)
    return Topology(model_name(model), config, input_ids.cpu().numpy(), layers)
