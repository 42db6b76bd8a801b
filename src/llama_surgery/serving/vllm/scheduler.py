"""The engine's scheduler, which cuts prompts at whole tiles only."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from llama_surgery.serving.families import read_block
from llama_surgery.serving.paged import piece
from llama_surgery.serving.vllm.modes import asks_for_dense


class TileScheduler(Scheduler):
    """Uses the engine's own place for aligned pieces, made for models with state-space layers."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> "TileScheduler":
        """An asynchronous one where the engine is to schedule so, which it decides late."""
        return object.__new__(_Async if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, _ = read_block(self.vllm_config.model_config.hf_config.surgery)
        self._tile = config.tile
        self.need_mamba_block_aligned_split = True

    def add_request(self, request: Any) -> None:
        """Dense requests share cache blocks among themselves alone: what they hold depends on the mode."""
        dense, salt = asks_for_dense(request.sampling_params), request.cache_salt
        if dense or salt:  # a salt of its own must not be another mode's
            request.cache_salt = f"{'dense' if dense else 'operated'} {salt or ''}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return piece(start, num_new_tokens, request.num_prompt_tokens, self._tile)


class _Async(TileScheduler, AsyncScheduler):
    pass
