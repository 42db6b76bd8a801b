"""The engine's models with operated attention layers, one for each family."""

from typing import Any

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from llama_surgery.serving.vllm.layers import operate_layers


class _Operated:
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        operate_layers(self, vllm_config)  # type: ignore[arg-type]

    def get_model_state_cls(self) -> type:
        """Asked for by the engine's second model runner."""
        from llama_surgery.serving.vllm.model_state import SurgeryModelState

        return SurgeryModelState


class SurgeryLlamaForCausalLM(_Operated, LlamaForCausalLM):
    """An exported Llama."""


class SurgeryMistralForCausalLM(_Operated, MistralForCausalLM):
    """An exported Mistral."""


class SurgeryQwen2ForCausalLM(_Operated, Qwen2ForCausalLM):
    """An exported Qwen 2."""


class SurgeryQwen3ForCausalLM(_Operated, Qwen3ForCausalLM):
    """An exported Qwen 3."""
