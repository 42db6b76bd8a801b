"""Executes the token-masked mode: every row sees exactly the sinks, its window and the keys of its own ball.

Rows are sorted as keys are, so that a tile's rows share a ball and its lists are short.
"""

import dataclasses

import torch
import triton

from llama_surgery.attention.impl.triton import obstacle
from llama_surgery.attention.impl.triton.helpers import device_of
from llama_surgery.attention.impl.triton.job import STRIP_BYTES
from llama_surgery.attention.impl.triton.token_mask_kernels import (
    ball_kernel,
    ball_list_kernel,
    window_kernel,
)
from llama_surgery.attention.impl.triton.token_mask_rule import BallRule, ball_intervals, near_pairs
from llama_surgery.attention.impl.triton.tuning import family_of, tuning_for
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

#: Rows of a tile at most: more of them share fewer pages.
LARGEST_TILE = 64

#: Pages that the list kernel holds at once.
LIST_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class BallResult:
    """What :func:`attend_balls` returns.

    Attributes:
        out: (streams, heads, rows, value_dim), the queries' dtype.
        lse: (streams, heads, rows) float32, log-sum-exp of the visible logits.
        near_pairs: (query, key) pairs of sinks and window, for one head.
        read_pairs: (streams, heads) int64, pairs of the pages that tiles read.
        seen_pairs: (streams, heads) int64, those of them that rows see.
    """

    out: torch.Tensor
    lse: torch.Tensor
    near_pairs: int
    read_pairs: torch.Tensor
    seen_pairs: torch.Tensor


def attend_balls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_paths: torch.Tensor,
    key_paths: torch.Tensor,
    rule: BallRule,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> BallResult:
    """Attention of a text's last rows over exactly the keys that :func:`token_mask_rule.token_mask` shows.

    Nothing is read back to the host. Where query heads have key paths of their own, make every query head a
    stream.

    Args:
        queries: (streams, heads, rows, head_dim), rows at the last positions.
        keys, values: (streams, keys, dim), all positions in order.
        query_paths: (streams, heads, rows) int64.
        key_paths: (streams, keys) int64.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.

    Raises:
        SurgeryError: Shapes that do not fit together, too many balls, or tensors that the kernels cannot run.
    """
    _check(queries, keys, query_paths, key_paths, values, rule)
    streams, heads, rows, dim = queries.shape
    count, value_dim = keys.shape[1], values.shape[-1]
    tuning = tuning_for(family_of(queries.device), max(dim, value_dim), queries.element_size())
    tile, page = min(tuning.rows, LARGEST_TILE), tuning.block_near
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values))
    shared = {
        "HEADS": heads,
        "TILE": tile,
        "PAGE": page,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": max(16, triton.next_power_of_2(value_dim)),
        "CAP": softcap is not None,
        "num_warps": tuning.attend_warps,
        "num_stages": tuning.attend_stages,
    }
    scalars = (dim**-0.5 if scale is None else scale, 1.0 if softcap is None else softcap)
    found = ball_intervals(query_paths, key_paths, rule)
    near_out = queries.new_empty(streams, heads, rows, value_dim, dtype=torch.float32)
    near_lse = near_out.new_empty(streams, heads, rows)
    out, lse = near_out.new_empty(near_out.shape, dtype=queries.dtype), torch.empty_like(near_lse)
    tiles, capacity = triton.cdiv(rows, tile), triton.cdiv(count, page)
    counts = found.low.new_empty(streams * heads, tiles)
    with device_of(queries):
        window_kernel[(tiles, heads, streams)](
            queries,
            keys,
            values,
            near_out,
            near_lse,
            *queries.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            rows,
            count,
            rule.window,
            rule.sinks,
            *scalars,
            **shared,
        )
        sorted_keys, sorted_values = (
            x.gather(1, found.key_order.unsqueeze(-1).expand_as(x)) for x in (keys, values)
        )
        room = max(1, STRIP_BYTES // (4 * streams * heads * capacity))
        for first in range(0, tiles, room):
            strip = min(room, tiles - first)
            pages = counts.new_empty(streams * heads, strip, capacity)
            number = counts.new_empty(streams * heads, strip)
            grid = (strip, streams * heads)
            ball_list_kernel[grid](
                found.low,
                found.high,
                pages,
                number,
                rows,
                first,
                capacity,
                TILE=tile,
                PAGE=page,
                BLOCK=LIST_BLOCK,
            )
            ball_kernel[grid](
                queries,
                sorted_keys,
                sorted_values,
                found.row_order,
                found.low,
                found.high,
                pages,
                number,
                near_out,
                near_lse,
                out,
                lse,
                *queries.stride()[:3],
                *sorted_keys.stride()[:2],
                *sorted_values.stride()[:2],
                rows,
                count,
                first,
                capacity,
                *scalars,
                **shared,
            )
            counts[:, first : first + strip] = number
    rows_of = torch.full((tiles,), tile, device=counts.device)
    rows_of[-1] = rows - (tiles - 1) * tile
    read = (counts.long() * rows_of).sum(-1).view(streams, heads) * page
    seen = (found.high - found.low).long().sum(-1)
    near = near_pairs(count, rule) - near_pairs(count - rows, rule)
    return BallResult(out, lse, near, read, seen)


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_paths: torch.Tensor,
    key_paths: torch.Tensor,
    values: torch.Tensor,
    rule: BallRule,
) -> None:
    streams, heads, rows, dim = queries.shape
    count = keys.shape[1]
    fits = (
        keys.shape == (streams, count, dim)
        and values.shape[:2] == keys.shape[:2]
        and query_paths.shape == (streams, heads, rows)
        and key_paths.shape == (streams, count)
        and 0 < rows <= count
    )
    if not fits:
        raise SurgeryError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, query "
            f"paths {tuple(query_paths.shape)}, key paths {tuple(key_paths.shape)}: expected (streams, "
            "heads, rows, head_dim), (streams, keys, head_dim), (streams, keys, value_dim), (streams, heads, "
            "rows) and (streams, keys), with at most as many rows as keys."
        )
    if rule.balls * count >= 2**63:
        raise SurgeryError(
            f"{rule.balls} balls of {count} keys: ball and position must fit in 63 bits together. Use fewer "
            "levels or a larger radius."
        )
    # Balls have no tiles that a rule could be at odds with: only tensors are looked at.
    problem = obstacle(SurgeryConfig(), queries, values, 1)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)):
        problem = "the token-masked mode does not differentiate; use torch.no_grad()"
    if problem is not None:
        raise SurgeryError(f"the triton kernels cannot run this: {problem}.")
