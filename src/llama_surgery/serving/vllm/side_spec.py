"""The side cache's specification for vLLM 0.26, which has no specification of so many bytes a block."""

import dataclasses

from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideSpec(FullAttentionSpec):
    """``head_size`` numbers for every block and KV head."""

    @property
    def real_page_size_bytes(self) -> int:
        return self.num_kv_heads * self.head_size * self.dtype.itemsize
