"""What depends on the engine's version. Everything else in this room uses these names."""

from typing import Any

from llama_surgery.errors import SurgeryError

#: Releases that the tests were run with, as major.minor.
SUPPORTED = ("0.32",)


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
    """Schedule with :class:`TileScheduler`, which is not an asynchronous one.

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
    if scheduler.async_scheduling:
        raise SurgeryError("--async-scheduling is not supported. Leave the option out.")
    scheduler.scheduler_cls = name
    scheduler.async_scheduling = False


def side_cache_spec(block_size: int, kv_heads: int, bytes_per_head: int) -> Any:
    """Cache specification of a layer that keeps ``bytes_per_head`` for every block and KV head, as float32.

    It shares blocks with the layers' keys and values: the engine puts layers that need equally many blocks of
    one size into one group. The cache arrives as (blocks, kv_heads, 1, bytes_per_head / 4).
    """
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_size=1,
        dtype=torch.float32,
        state_content_bytes=bytes_per_head,
        tokens_per_state=block_size,
    )


def sequence_lengths(common: Any) -> list[int]:
    """Tokens of every sequence after the step, on the host: exact without speculative decoding."""
    lengths = common.seq_lens_cpu_upper_bound
    return (common.seq_lens.cpu() if lengths is None else lengths).tolist()
