"""How a call of decode is cut into programs, and the constants that its kernels are compiled with."""

import math
from typing import Any, NamedTuple

import torch
import triton

from llama_surgery.attention.impl.triton.decode.cache import DecodeCache
from llama_surgery.attention.impl.triton.decode.open_kernel import WORD
from llama_surgery.attention.impl.triton.decode.tuning import (
    MERGED_ELEMENTS,
    MOST_ROWS,
    DecodeTuning,
    open_splits,
    processors_of,
    score_splits,
)
from llama_surgery.attention.impl.triton.helpers import pad_to_power, product_options
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import first_far

#: Elements of a matrix tile (rows x head dim) from which on it takes eight warps.
LARGE_TILE = 1 << 13


class Shape(NamedTuple):
    """How a call is cut into programs.

    Attributes:
        rows_block: Queries of a matrix tile.
        rows_pad, heads_pad: The matrix tile, at least 16 rows.
        dim_pad, value_pad: Head dims as powers of two.
        keys: Keys of a step.
        splits, far_splits: Programs per stream of the first and of the second kernel.
    """

    rows_block: int
    rows_pad: int
    heads_pad: int
    dim_pad: int
    value_pad: int
    keys: int
    splits: int
    far_splits: int
    tuning: DecodeTuning

    @classmethod
    def of(cls, queries: torch.Tensor, cache: DecodeCache, tuning: DecodeTuning) -> "Shape":
        config = cache.config
        streams, heads, rows, dim = queries.shape
        heads_pad = triton.next_power_of_2(heads)
        rows_block = min(rows, max(1, MOST_ROWS // heads_pad))
        rows_pad = triton.next_power_of_2(rows_block)
        heads_pad = max(heads_pad, 16 // rows_pad)
        keys = tuning.keys_per_step(dim, cache.values.shape[-1], queries.element_size())
        programs = streams * triton.cdiv(rows, rows_block)
        processors = processors_of(queries.device)
        near = min(max(first_far(config), cache.dense_until) + rows, cache.capacity)
        pages = 0
        if cache.dense_until < cache.capacity:
            pages = max(0, cache.capacity - config.window) // config.chunk_size * config.pages_per_chunk
        units = triton.cdiv(near, keys) + triton.cdiv(pages, keys)
        far_splits = open_splits(config, pages, programs, processors, tuning) if pages else 0
        splits = score_splits(units, programs, processors, tuning)
        dim_pad, value_pad = (pad_to_power(d) for d in (dim, cache.values.shape[-1]))
        return cls(rows_block, rows_pad, heads_pad, dim_pad, value_pad, keys, splits, far_splits, tuning)

    def warps(self, fewest: int) -> int:
        """More warps where a matrix tile's accumulator would not fit the registers of ``fewest``."""
        return max(fewest, 8) if self.rows_pad * self.heads_pad * self.dim_pad >= LARGE_TILE else fewest

    def constants(self, queries: torch.Tensor, cache: DecodeCache, *, capped: bool) -> dict[str, Any]:
        config, (dim, value_dim) = cache.config, (queries.shape[-1], cache.values.shape[-1])
        return {
            "KV_HEADS": cache.kv_heads,
            "HEADS": queries.shape[1],
            "HEADS_PAD": self.heads_pad,
            "ROWS": queries.shape[2],
            "ROWS_PAD": self.rows_pad,
            "ROWS_BLOCK": self.rows_block,
            "DIM": dim,
            "DIM_PAD": self.dim_pad,
            "VALUE_DIM": value_dim,
            "VALUE_PAD": self.value_pad,
            "CHUNK": config.chunk_size,
            "WINDOW": config.window,
            "PAGE": config.page_size,
            "CAP": capped,
            "PAGED": cache.table is not None,
            **product_options(queries),
        }

    def score_constants(self, cache: DecodeCache) -> dict[str, float]:
        config = cache.config
        return {
            "LOG2_PAGE": math.log2(config.page_size),
            "BLOCK_NEAR": self.keys,
            "BLOCK_PAGES": self.keys,
            "SUMMARY": cache.features is not None and config.summarises(1),
            "num_warps": self.warps(self.tuning.score_warps),
            "num_stages": self.tuning.score_stages,
        }

    def merge_constants(self) -> dict[str, int]:
        parts_pad = triton.next_power_of_2(self.splits + self.far_splits)
        fit = max(1, MERGED_ELEMENTS // self.value_pad)
        block = min(parts_pad, self.tuning.merge_parts, fit)
        return {"PARTS_PAD": parts_pad, "BLOCK": block, "num_warps": self.tuning.merge_warps}

    def open_constants(self, config: SurgeryConfig) -> dict[str, int]:
        page_pad = pad_to_power(config.page_size)
        return {
            "BLOCK_KEYS": min(page_pad, self.keys),
            "SPLITS_PAD": triton.next_power_of_2(self.splits),
            "SUMMARY": config.summarises(1),
            "BLOCK_MEANS": min(WORD.value, self.keys),
            "num_warps": self.warps(self.tuning.open_warps),
            "num_stages": self.tuning.open_stages,
        }
