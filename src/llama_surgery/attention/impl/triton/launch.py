"""How a call is packed into launches: matrix tiles, constants, descriptors."""

import math
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_surgery.attention.impl.triton.helpers import product_options
from llama_surgery.attention.impl.triton.job import Job, Strip


class ScoreShape(NamedTuple):
    """How selection packs queries and heads into matrix tiles."""

    tile_pad: int
    heads_block: int
    head_blocks: int
    tiles_block: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a matrix tile."""
        return self.tile_pad * self.heads_block * self.tiles_block

    @classmethod
    def of(cls, job: Job, strip: Strip) -> "ScoreShape":
        choosers, heads = job.queries.shape[:2]
        tile_pad = triton.next_power_of_2(job.tile)
        heads_pad = triton.next_power_of_2(heads)
        rows = job.tuning.score_rows
        # Fewer rows per program where there would not be two programs for each processor.
        while rows > 32 and choosers * strip.tiles * tile_pad * heads_pad < rows * 256:
            rows //= 2
        heads_block = min(heads_pad, max(1, rows // tile_pad))
        tiles_block = max(1, max(16, rows) // (tile_pad * heads_block))
        tiles_block = min(tiles_block, triton.next_power_of_2(strip.tiles))
        # A matrix tile has at least 16 rows.
        heads_block = max(heads_block, 16 // (tile_pad * tiles_block))
        return cls(
            tile_pad,
            heads_block,
            triton.cdiv(heads, heads_block),
            tiles_block,
            triton.cdiv(strip.tiles, tiles_block),
        )


def score_constants(job: Job, shape: ScoreShape) -> dict[str, Any]:
    """Constants of every kernel that scores, and how it is launched."""
    head_dim = job.queries.shape[-1]
    spread = head_dim // job.config.variance_pool
    stages = job.tuning.score_stages if spread == head_dim else job.tuning.pooled_stages
    weighted = job.router.mean_weight is not None or job.router.variance_weight is not None
    if weighted and shape.head_blocks > 1:
        stages = 1  # weights are loaded for each block of heads: loads ahead would keep room for all of them
    return {
        "GROUP": job.group,
        "HEADS": job.queries.shape[1],
        "HEADS_BLOCK": shape.heads_block,
        "TILE": job.tile,
        "TILE_PAD": shape.tile_pad,
        "DIM": head_dim,
        "DIM_PAD": max(16, triton.next_power_of_2(head_dim)),
        "SPREAD": spread,
        "SPREAD_PAD": max(16, triton.next_power_of_2(spread)),
        "CAP": job.softcap is not None,
        "LOG2_PAGE": math.log2(job.config.page_size),
        # A tile longer than what was tuned for: threads hold as many of its rows as they did.
        "num_warps": min(8, job.tuning.score_warps * max(1, shape.rows // job.tuning.score_rows)),
        "num_stages": stages,
        **product_options(job.queries),
    }


def scored_rows(job: Job, strip: Strip) -> tuple[float, ...]:
    """Arguments of kernels that say which rows are scored, and how."""
    softcap = 1.0 if job.softcap is None else job.softcap
    return job.start, job.stop, strip.first_tile, job.config.dense_until, job.scale, softcap


def placed_rows(job: Job, strip: Strip) -> tuple[int, ...]:
    """Arguments of kernels that read the near field: which rows are given, and where keys and tiles begin."""
    return job.start, job.stop, job.near_start, strip.first_tile, job.config.dense_until


def heads_of_tile(heads: int, rows: int, tile_pad: int) -> int:
    """Heads of a matrix tile: a power of two, at most ``rows`` rows and at least 16."""
    most = max(1, rows // tile_pad)
    return max(min(triton.next_power_of_2(heads), most), 16 // tile_pad, 1)


def described(states: torch.Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of (streams, …, dim) states that loads a ``block`` of one stream, zeros beyond."""
    return TensorDescriptor.from_tensor(aligned(states, block[-1]), [1, *block])


def aligned(states: torch.Tensor, width: int) -> torch.Tensor:
    """States that tensor maps take: rows begin at multiples of 16 bytes. Others are copied, made ``width``
    wide."""
    unit = 16 // states.element_size()
    if states.data_ptr() % 16 or any(stride % unit for stride in states.stride()[:-1]):
        states = torch.nn.functional.pad(states, (0, width - states.shape[-1])).contiguous()
        if states.data_ptr() % 16:
            states = states.clone()
    return states
