"""Operated attention layers: the engine's own, with another backend, a side cache and corrections."""

import dataclasses
from collections import Counter
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from llama_surgery.errors import UnsupportedModelError
from llama_surgery.serving.counting import EngineCounters, LayerCounters
from llama_surgery.serving.execution import Executor, executor_for
from llama_surgery.serving.families import check_cache_dtype, read_block
from llama_surgery.serving.sharding import RouterShard
from llama_surgery.serving.vllm import compat
from llama_surgery.serving.vllm.backend import SideBackend, backend_for
from llama_surgery.topology.geometry import first_far

logger = init_logger("vllm.llama_surgery")


class SideCache(torch.nn.Module, AttentionLayerBase):
    """Order and moments of every cache block of a layer; the engine allocates it and numbers its blocks.

    Attributes:
        kv_cache: (blocks, kv_heads, 1, floats) float32, once the engine has bound it.
    """

    def __init__(self, prefix: str, kv_heads: int, bytes_per_head: int) -> None:
        super().__init__()
        self.kv_heads, self.bytes_per_head = kv_heads, bytes_per_head
        self.kv_cache = torch.tensor([])
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return compat.side_cache_spec(vllm_config.cache_config.block_size, self.kv_heads, self.bytes_per_head)

    def get_attn_backend(self) -> type[SideBackend]:
        return SideBackend


@dataclasses.dataclass(frozen=True)
class LayerSurgery:
    """What an operated layer carries: its executor, this rank's corrections, side cache and counters, and
    those of its engine."""

    executor: Executor
    shard: RouterShard
    side: SideCache
    counters: LayerCounters
    engine: EngineCounters


def operate_layers(model: torch.nn.Module, vllm_config: Any) -> None:
    """Give every attention layer of a freshly built model the exported topology.

    Raises:
        SurgeryError: The ``surgery`` block is damaged, or a layer cannot be operated.
    """
    config, routers = read_block(vllm_config.model_config.hf_config.surgery)
    context = vllm_config.compilation_config.static_forward_context
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    operated, executors, engine = 0, Counter[tuple[str, str]](), EngineCounters()
    for module in list(model.modules()):
        dense = getattr(module, "attn", None)
        if type(dense) is not Attention:
            continue
        if dense.sliding_window is not None:
            raise UnsupportedModelError(f"{dense.layer_name} has a sliding window: not served.")
        index = extract_layer_index(dense.layer_name)
        del context[dense.layer_name]
        executor = executor_for(
            config,
            dense.head_size,
            device=vllm_config.device_config.device,
            dtype=vllm_config.model_config.dtype,
            cache_dtype=dense.kv_cache_torch_dtype,
        )
        layer = Attention(
            dense.num_heads,
            dense.head_size,
            module.scaling,
            num_kv_heads=dense.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=dense.quant_config,
            prefix=dense.layer_name,
            attn_backend=backend_for(dense, alone=config.theta_decode > 0 and not executor.kernels),
        )
        # A checkpoint may ask for it layer by layer, whatever the engine's option says.
        check_cache_dtype(layer.kv_cache_dtype, f"{dense.layer_name}.kv_cache_dtype")
        group, heads = dense.num_heads // dense.num_kv_heads, dense.num_kv_heads
        shard = RouterShard(routers.get(index, []), heads * ranks, group, dense.head_size, rank, ranks)
        side = SideCache(f"{dense.layer_name}.side", heads, executor.side_bytes())
        counted = LayerCounters(config, heads, quiet=rank > 0)
        engine.register(index, counted)
        module.attn, module.router = layer, shard
        # Not a submodule of the layer: the corrections belong to the attention module, where weights look.
        layer.__dict__["surgery"] = LayerSurgery(executor, shard, side, counted, engine)
        operated += 1
        executors[executor.name, executor.reason] += 1
    left = [name for name, layer in context.items() if isinstance(layer, Attention)]
    left = [name for name in left if not hasattr(context[name], "surgery")]
    if left or not operated:
        raise UnsupportedModelError(
            f"{operated} layers operated, left dense: {', '.join(left) or 'all'}. No server may be dense in "
            "silence; serve the dense checkpoint instead."
        )
    logger.info(
        "llama-surgery is active: %d layers operated, topology %s, chunks of %d, θ %.4g in prefill from "
        "position %d on, %.4g in decode",
        operated,
        config.topology,
        config.chunk_size,
        config.theta,
        first_far(config),
        config.theta_decode,
    )
    for (name, reason), count in executors.items():
        logger.info("llama-surgery: %d layers executed by %s%s", count, name, reason and f": {reason}")
