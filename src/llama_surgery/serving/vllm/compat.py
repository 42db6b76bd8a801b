"""What depends on the engine's version. Everything else in this room uses these names."""

import copy
import dataclasses
from typing import Any

import torch

from llama_surgery.errors import SurgeryError

#: Releases that the tests were run with, as major.minor.
SUPPORTED = ("0.26", "0.32")
#: The engine's attention backends whose caches the plugin can read.
KNOWN_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")
#: Who tells the first model runner's layers which requests are dense.
SWITCHES = "llama_surgery.serving.vllm.modes:BatchModes"


def unsupported_version() -> str | None:
    """Why the installed engine is not served on; None where it is of a release that was tested."""
    from vllm.version import __version__

    if ".".join(__version__.split(".")[:2]) in SUPPORTED:
        return None
    return (
        f"vLLM {__version__}: this release of llama-surgery serves on {', '.join(SUPPORTED)}.x. Install one "
        "of them, or a newer llama-surgery."
    )


def own_block_size(vllm_config: Any, size: int) -> None:
    """Let a cache block hold ``size`` tokens, and let no later step change it.

    Raises:
        SurgeryError: The operator asked for another size.
    """
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != size:
        raise SurgeryError(
            f"--block-size {cache.block_size}: a cache block must be a whole chunk, {size} tokens. Leave the "
            "option out."
        )
    cache.block_size = size
    cache.user_specified_block_size = True


def own_scheduler(vllm_config: Any) -> None:
    """Schedule with :class:`TileScheduler`.

    Raises:
        SurgeryError: The operator asked for another scheduler.
    """
    scheduler = vllm_config.scheduler_config
    name = "llama_surgery.serving.vllm.scheduler.TileScheduler"
    if scheduler.scheduler_cls not in (None, name):
        raise SurgeryError(
            f"--scheduler-cls {scheduler.scheduler_cls}: prompts must be cut at whole tiles, which the "
            "plugin's own scheduler does. Leave the option out."
        )
    scheduler.scheduler_cls = name


def own_switch(vllm_config: Any) -> None:
    """Let layers know the switches of requests. The second model runner tells them itself; one for pooling
    has none to tell, and takes no logits processors."""
    model = vllm_config.model_config
    if not vllm_config.use_v2_model_runner and model.runner_type != "pooling":
        model.logits_processors = [*(model.logits_processors or ()), SWITCHES]


def without_tokens(free: type) -> None:
    """Spare the first model runner the lists of generated tokens, which it makes in every step once there is
    a logits processor of one's own: asynchronous steps would wait for them.

    Args:
        free: The processor that needs none. Beside others they are made as ever.
    """
    from vllm.v1.worker.gpu_input_batch import InputBatch

    flag = "logitsprocs_need_output_token_ids"

    def needed(batch: Any) -> bool:
        others = [p for p in batch.logitsprocs.all if not isinstance(p, free)]
        return batch.__dict__[flag] and any(not type(p).__module__.startswith("vllm.") for p in others)

    setattr(InputBatch, flag, property(needed, lambda batch, value: batch.__dict__.update({flag: value})))


def side_cache_spec(block_size: int, kv_heads: int, bytes_per_head: int) -> Any:
    """Cache specification of a layer that keeps ``bytes_per_head`` for every block and KV head, as float32.

    It shares blocks with the layers' keys and values: the engine puts layers that need equally many blocks of
    one size into one group. The cache arrives as (blocks, kv_heads, 1, bytes_per_head / 4).
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape = {"block_size": block_size, "num_kv_heads": kv_heads, "dtype": torch.float32}
    if "state_content_bytes" not in (field.name for field in dataclasses.fields(FullAttentionSpec)):  # 0.26
        from llama_surgery.serving.vllm.side_spec import SideSpec

        return SideSpec(head_size=bytes_per_head // 4, **shape)
    sizes = {"state_content_bytes": bytes_per_head, "tokens_per_state": block_size}
    return FullAttentionSpec(head_size=1, **shape, **sizes)


def most_sequences(vllm_config: Any) -> int:
    """Most sequences of a step, with those that pad it to the size of a CUDA graph."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return max(vllm_config.scheduler_config.max_num_seqs, *sizes)


def sequence_lengths(common: Any) -> torch.Tensor:
    """Tokens of every sequence after the step, on the host: exact without speculative decoding."""
    lengths = common.seq_lens_cpu_upper_bound
    return common.seq_lens.cpu() if lengths is None else lengths[: common.num_reqs]


def readable(dense: Any, layer: Any) -> bool:
    """Can :func:`keys_and_values` read the cache of backend ``dense``? A CPU's depends on the machine."""
    if dense.get_name() != "CPU_ATTN":
        return True
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    config = get_current_vllm_config()
    size, kind = config.cache_config.block_size, layer.kv_cache_dtype
    return _get_attn_isa(config.model_config.dtype, size, layer.head_size, kind) == "vec"


def keys_and_values(name: str, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (blocks, kv_heads, block_size, head_dim) of the cache of the backend ``name``."""
    blocks, heads, size, width = kv_cache.shape
    if name != "CPU_ATTN":
        return kv_cache[..., : width // 2], kv_cache[..., width // 2 :]
    keys, values = kv_cache.view(blocks, heads, 2, size * width // 2).unbind(2)
    # Keys lie channel by channel.
    return keys.unflatten(-1, (width // 2, size)).transpose(2, 3), values.unflatten(-1, (size, width // 2))


def without_graphs(vllm_config: Any) -> Any:
    """A copy of the configuration for a metadata builder whose metadata no CUDA graph will see."""
    from vllm.config import CUDAGraphMode

    made = copy.copy(vllm_config)
    made.compilation_config = copy.copy(made.compilation_config)
    made.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    return made


def graph_support(support: Any = None) -> Any:
    """``support`` of CUDA graphs, but for decode steps alone; without it, that of layers which do nothing."""
    from vllm.v1.attention.backend import AttentionCGSupport as Support

    if support is None:
        return Support.ALWAYS
    return min(support, Support.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda support: support.value)


def part_of(
    common: Any, starts: torch.Tensor, lengths: torch.Tensor, where: torch.Tensor, rows: torch.Tensor | slice
) -> Any:
    """The engine's description of a step, for some rows of it.

    Args:
        common: Of the whole step.
        starts: (n + 1,) int32 on the host, first row of every run of rows among ``rows``.
        lengths: (n,) int32 on the host, keys that the last row of every run sees.
        where: (n,) int64, sequence of every run.
        rows: int64, the rows, or a slice.
    """
    device = common.seq_lens.device
    changed = {
        "query_start_loc": starts.to(device, non_blocking=True),
        "query_start_loc_cpu": starts,
        "seq_lens": lengths.to(device, non_blocking=True),
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": len(lengths),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(starts.diff().max()),
        "max_seq_len": int(lengths.max()),
        "block_table_tensor": common.block_table_tensor[where],
        "slot_mapping": common.slot_mapping[rows],
        "positions": None if common.positions is None else common.positions[rows],
        "is_prefilling": None,
        "_seq_lens_cpu": lengths,
        "_num_computed_tokens_cpu": None,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
        "req_idx": None,
    }
    known = {field.name for field in dataclasses.fields(common)}
    return dataclasses.replace(common, **{name: value for name, value in changed.items() if name in known})
