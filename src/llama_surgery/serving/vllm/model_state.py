"""What the second model runner tells layers of a step, as the first one does or in its place."""

import dataclasses
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from llama_surgery.serving.vllm.modes import asks_for_dense, engine_of


class SurgeryModelState(DefaultModelState):
    """Generated tokens that are computed again after a preemption are no part of the prompt."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prompts = np.zeros(self.max_num_reqs, dtype=np.int64)
        self._dense = np.zeros(self.max_num_reqs, dtype=bool)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Keep the length of the prompt, and whether it is dense."""
        super().add_request(req_index, new_req_data)
        engine_of(self.vllm_config).joined += 1
        self._dense[req_index] = asks_for_dense(new_req_data.sampling_params)
        self._prompts[req_index] = len(new_req_data.prompt_token_ids or new_req_data.prefill_token_ids)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See the engine's."""
        places = input_batch.idx_mapping_np
        engine_of(self.vllm_config).dense = frozenset(np.flatnonzero(self._dense[places]).tolist())
        prompts = self._prompts[places]
        prefilling = input_batch.num_computed_tokens_np < prompts
        changed = dataclasses.replace(input_batch, is_prefilling_np=prefilling)
        return super().prepare_attn(changed, *args, **kwargs)
