"""What the engine's configuration must be for an exported model: checked, and set, before anything loads."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.families import BLOCK, check_cache_dtype, read_block
from llama_surgery.serving.sharding import kv_heads_of_rank
from llama_surgery.serving.vllm import compat


class StartUp(VerifyAndUpdateConfig):
    """The engine calls it for exported models alone."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """
        Raises:
            SurgeryError: An option is not supported, with the reason.
        """
        config, _ = read_block(getattr(vllm_config.model_config.hf_config, BLOCK, None))
        _refuse(vllm_config, config)
        compat.own_block_size(vllm_config, config.chunk_size)
        compat.own_scheduler(vllm_config)
        compat.own_switch(vllm_config)


def _refuse(vllm_config: Any, config: SurgeryConfig) -> None:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    check_cache_dtype(str(cache.cache_dtype), "--kv-cache-dtype")
    for option, value, reason in (
        ("--speculative-config", vllm_config.speculative_config, "rejected tokens would stay in full chunks"),
        ("--kv-transfer-config", vllm_config.kv_transfer_config, "the side cache is not transferred"),
        ("--enable-lora", vllm_config.lora_config, "thresholds are calibrated for the model as exported"),
    ):
        if value is not None:
            raise SurgeryError(f"{option} is not supported: {reason}. Leave the option out.")
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option) > 1:
            raise SurgeryError(f"{option}={getattr(parallel, option)}: a chunk must lie on one rank. Use 1.")
    text = vllm_config.model_config.hf_text_config
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kv_heads_of_rank(kv_heads, 0, parallel.tensor_parallel_size)
    _refuse_small_steps(vllm_config.scheduler_config, config.tile)


def _refuse_small_steps(scheduler: Any, tile: int) -> None:
    """Prompts are cut at whole tiles: a step without room for one would never get on with its prompt."""
    least = tile + scheduler.max_num_seqs - 1
    for option in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        tokens = getattr(scheduler, option)
        if tokens is not None and tokens < least:
            raise SurgeryError(
                f"--{option.replace('_', '-')} {tokens}: with --max-num-seqs {scheduler.max_num_seqs} at "
                f"least {least} are needed, so that a whole tile of a prompt ({tile} tokens) fits beside a "
                "token of every other sequence."
            )
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < tile:
        raise SurgeryError(
            f"--long-prefill-token-threshold {threshold}: a piece of a prompt is at least a tile. Use {tile} "
            "or more, or leave the option out."
        )
