"""Attention of the newest tokens over a preallocated cache: three launches, static shapes, no host sync."""

import dataclasses

import torch
import triton

from llama_surgery.attention.impl.triton import MOST_QUERIES
from llama_surgery.attention.impl.triton.decode.cache import DecodeCache, page_strides
from llama_surgery.attention.impl.triton.decode.check import check_call
from llama_surgery.attention.impl.triton.decode.merge_kernel import merge_kernel
from llama_surgery.attention.impl.triton.decode.open_kernel import open_kernel
from llama_surgery.attention.impl.triton.decode.score_kernels import score_kernel
from llama_surgery.attention.impl.triton.decode.shape import Shape
from llama_surgery.attention.impl.triton.decode.tuning import DecodeTuning, decode_tuning_for
from llama_surgery.attention.impl.triton.helpers import bar_of, launching
from llama_surgery.attention.impl.triton.tuning import family_of
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """What :func:`decode` returns.

    Attributes:
        out: (streams, heads, rows, value_dim), the queries' dtype.
        lse: (streams, heads, rows) float32, log-sum-exp of the visible logits, attention sink included.
        opened: (streams, rows) int32, pages that the row opened: what it sees of the far field; 0 where
            nothing is known of pages.
        read: (streams, rows) int32, pages that were read for it: those that it or a row computed with it
            opened. Rows are computed in blocks of ``rows_block``, which read a page once.
        rows_block: Rows that are computed together.
    """

    out: torch.Tensor
    lse: torch.Tensor
    opened: torch.Tensor
    read: torch.Tensor
    rows_block: int


def decode(
    queries: torch.Tensor,
    cache: DecodeCache,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logit: torch.Tensor | None = None,
    router: PageRouter | None = None,
    tally: torch.Tensor | None = None,
    advance: bool = False,
    tuning: DecodeTuning | None = None,
) -> DecodeResult:
    """Attention of the tokens that :func:`append_tokens` wrote last. Every row is a tile of one query.

    Row r of a sequence is at position ``lengths + r``. A row beyond the cache's capacity, for whose key there
    was no room, is NaN.

    Args:
        queries: (streams, heads, rows, head_dim), rotary embedding applied, 1 to 8 rows.
        cache: Holds the rows' own keys and values.
        scale: Scaling of q·k, default ``head_dim**-0.5``.
        softcap: Cap of the logits, or None.
        sink_logit: (streams, heads) attention-sink parameters, or None.
        router: Learned corrections, one for every KV head, float32 on the cache's device, or None.
        tally: (2, kv_heads) int64, contiguous: pages opened and pages read are added to it. Or None.
        advance: Settle all rows in the end: add their number to ``cache.lengths``. Else the cache is not
            changed.
        tuning: Launch configuration, default that of the GPU's family.

    Raises:
        SurgeryError: Shapes that do not fit the cache, or a rule that these kernels do not run.
    """
    config = cache.config
    router = router or PageRouter()
    check_call(queries, cache, sink_logit, router, tally)
    _check(config, queries, cache)
    router = PageRouter(**{name: part.contiguous() for name, part in router.tensors().items()})
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    sink_logit = None if sink_logit is None else sink_logit.contiguous()
    shape = Shape.of(queries, cache, tuning or decode_tuning_for(family_of(queries.device)))
    streams, heads, rows, dim = queries.shape
    value_dim = cache.values.shape[-1]
    parts = shape.splits + shape.far_splits

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return queries.new_empty(streams, *size, dtype=dtype)

    scores = weights = sums = None
    if cache.features is not None:
        scores = new(cache.capacity // config.page_size, rows, heads)
        weights = torch.empty_like(scores) if config.summarises(1) else None
        sums = new(shape.splits, rows, heads)
    part_out, part_lse = new(parts, rows, heads, value_dim), new(parts, rows, heads)
    counts = new(shape.far_splits, rows, 2, dtype=torch.int32)
    result = DecodeResult(
        queries.new_empty(streams, heads, rows, value_dim),
        new(heads, rows),
        new(rows, dtype=torch.int32),
        new(rows, dtype=torch.int32),
        shape.rows_block,
    )
    cap = 1.0 if softcap is None else softcap
    factor = dim**-0.5 if scale is None else scale
    where = (*queries.stride()[:3], *cache.strides())
    blocks = streams * triton.cdiv(rows, shape.rows_block)
    with launching(queries):
        score_kernel[(shape.splits, blocks)](
            queries,
            cache.keys,
            cache.values,
            cache.features,
            router.mean_weight,
            router.variance_weight,
            router.summary,
            cache.lengths,
            cache.whole,
            cache.table,
            scores,
            weights,
            sums,
            part_out,
            part_lse,
            *where,
            *page_strides(cache.features),
            cache.capacity,
            shape.splits,
            parts,
            cache.dense_until,
            factor,
            cap,
            **shape.constants(queries, cache, capped=softcap is not None),
            **shape.score_constants(cache),
        )
        if shape.far_splits:
            assert cache.sink_page is not None
            open_kernel[(shape.far_splits, blocks)](
                queries,
                cache.keys,
                cache.values,
                cache.lengths,
                cache.whole,
                cache.table,
                cache.sink_page,
                sink_logit,
                router.offset,
                cache.mean_values,
                scores,
                weights,
                sums,
                part_out,
                part_lse,
                counts,
                *where,
                *cache.sink_page.stride(),
                *page_strides(cache.mean_values),
                cache.capacity,
                shape.splits,
                shape.far_splits,
                cache.dense_until,
                factor,
                cap,
                *bar_of(config, 1),
                **shape.constants(queries, cache, capped=softcap is not None),
                **shape.open_constants(config),
                SINK=sink_logit is not None,
            )
        merge_kernel[(heads * rows, streams)](
            part_out,
            part_lse,
            counts,
            sink_logit,
            result.out,
            result.lse,
            result.opened,
            result.read,
            tally,
            cache.lengths,
            parts,
            shape.far_splits,
            KV_HEADS=cache.kv_heads,
            HEADS=heads,
            ROWS=rows,
            VALUE_DIM=value_dim,
            VALUE_PAD=shape.value_pad,
            FAR_PAD=triton.next_power_of_2(shape.far_splits) if shape.far_splits else 0,
            SINK=sink_logit is not None,
            TALLY=tally is not None,
            ADVANCE=advance,
            **shape.merge_constants(),
        )
    return result


def decode_obstacle(config: SurgeryConfig, queries: torch.Tensor) -> str | None:
    """Why :func:`decode` cannot run a call that the other kernels can run, or None if it can.

    Args:
        queries: (…, rows, head_dim).
    """
    rows = queries.shape[-2]
    if not 1 <= rows <= MOST_QUERIES:
        return f"{rows} rows; decode takes 1 to {MOST_QUERIES} at a time"
    if rows > config.window + 1:
        return (
            f"{rows} rows with window={config.window}; a chunk could close in the call that fills it. Use at "
            f"most {config.window + 1} rows or a wider window"
        )
    if torch.is_grad_enabled() and queries.requires_grad:
        return "decode steps are not differentiated; use torch.no_grad()"
    return None


def _check(config: SurgeryConfig, queries: torch.Tensor, cache: DecodeCache) -> None:
    problem = decode_obstacle(config, queries)
    chosen = cache.features is not None and config.summarises(1)
    if problem is None and chosen and cache.mean_values is None:
        problem = f"summary={config.summary!r}, but the cache holds no mean values"
    if problem is not None:
        raise SurgeryError(f"the triton kernels cannot run this: {problem}.")
