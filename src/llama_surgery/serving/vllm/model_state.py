"""What the second model runner tells layers of a step, where it means another thing than the first one."""

import dataclasses
from typing import Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class SurgeryModelState(DefaultModelState):
    """Generated tokens that are computed again after a preemption are no part of the prompt."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prompts = np.zeros(self.max_num_reqs, dtype=np.int64)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Keep the length of the prompt."""
        super().add_request(req_index, new_req_data)
        self._prompts[req_index] = len(new_req_data.prompt_token_ids or new_req_data.prefill_token_ids)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See the engine's."""
        prompts = self._prompts[input_batch.idx_mapping_np]
        prefilling = input_batch.num_computed_tokens_np < prompts
        changed = dataclasses.replace(input_batch, is_prefilling_np=prefilling)
        return super().prepare_attn(changed, *args, **kwargs)
