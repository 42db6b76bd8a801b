"""Prefill attention at a length: clustered keys, plans of a density, checks, FlexAttention on the same plan.

Batch 1. Shapes, unless others are given, are those of an 8-billion-parameter Llama: 32 query, 8 KV heads of
128. Keys and queries are clustered, so that pages differ as those of text do.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton.job import Job, KeptMoments
from llama_surgery.attention.impl.triton.select import launch as selection
from llama_surgery.attention.impl.triton.tiled_plan import ENTRY, TiledPlan
from llama_surgery.attention.summary import summary_logits
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import Block, causal_pairs, closed_chunks
from llama_surgery.topology.layout import Moments
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import Scorer

from .measure import nearest_theta
from .states import clustered_states, plain_attention

STREAMS, HEADS, DIM = 8, 4, 128


@dataclasses.dataclass
class Data:
    """Queries (streams, heads, n, dim), keys and values (streams, n, dim) of one layer."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def make_data(
    length: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, int] | None = None
) -> Data:
    """States of a length; ``shape``: KV heads, and query heads of each."""
    return Data(*clustered_states(*(shape or (STREAMS, HEADS)), length, DIM, device, dtype))


def plans_of(job: Job, theta: float) -> list[TiledPlan]:
    """Plans of all strips at a θ; what summaries come to is lost."""
    config = dataclasses.replace(job.config, theta=theta, theta_decode=theta)
    job = dataclasses.replace(job, config=config)
    out, lse = outputs_of(job)
    return [selection.select(job, strip, out, lse) for strip in job.strips() if strip.pages]


def outputs_of(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a job, unwritten: NaN."""
    out = torch.full_like(job.queries, torch.nan)
    return out, torch.full(out.shape[:3], torch.nan, device=out.device)


def executed_pairs(plans: list[TiledPlan], page_size: int) -> float:
    """Far pairs that one query head reads, mean over heads."""
    return sum(float(p.executed_pairs(page_size).double().mean()) for p in plans)


def executed_density(plans: list[TiledPlan], page_size: int, length: int) -> float:
    return executed_pairs(plans, page_size) / causal_pairs(0, length)


def calibrate(job: Job, density: float) -> float:
    """θ whose executed far density is nearest to ``density``."""

    def executed(theta: float) -> float:
        return executed_density(plans_of(job, theta), job.config.page_size, job.stop)

    return nearest_theta(executed, density, f"at {job.stop:,} tokens", halvings=14)


def call_of(config: SurgeryConfig, router: PageRouter | None = None) -> AttentionCall:
    """Calls of the kernels with heads of DIM channels."""
    return AttentionCall(config, "triton", config.tile, DIM**-0.5, router=router)


def check_tiles(job: Job, plans: list[TiledPlan], out: torch.Tensor, samples: int = 6) -> tuple[float, float]:
    """Largest relative error of sampled tiles against float64 on the plan's own pages, and that of plain
    PyTorch in the queries' dtype on the same keys. Means stand in for other pages where the job's
    configuration says so.

    Args:
        out: Of all rows, with as many elements as the job's queries have.

    Raises:
        SurgeryError: The first exceeds the second by more than a half.
    """
    worst, plain = 0.0, 0.0
    size, config, layout = job.tile, job.config, job.layout
    tiles = job.stop // size
    (choosers, heads, _, dim), outs = job.queries.shape, out.reshape(*job.queries.shape[:3], -1)
    for sample in range(samples):
        tile = tiles - 1 - sample * (tiles // samples)
        chooser = (sample * 5) % choosers
        stream = chooser // job.group
        rows = slice(tile * size, (tile + 1) * size)
        closed = closed_chunks(tile * size, config, size)
        first = closed * config.chunk_size
        q = job.queries[chooser, :, rows]
        k, v = (x[stream, first : rows.stop] for x in (job.near_keys, job.near_values))
        row = torch.arange(size, device=q.device)
        key = torch.arange(first, rows.stop, device=q.device)
        visible = key[None] <= (row + rows.start)[:, None]
        logits, means = q.new_zeros(heads, size, 0), q.new_zeros(0, dim)
        for plan in plans:
            index = tile - plan.start // size
            if layout is None or not 0 <= index < plan.counts.shape[1]:
                continue
            entries = plan.entries[chooser, index, : plan.counts[chooser, index]]  # type: ignore[index]
            slot = torch.arange(config.page_size, device=q.device)
            slots = (entries.long() // ENTRY * config.page_size)[:, None] + slot
            k = torch.cat((k, layout.keys[stream, slots.flatten()]))
            v = torch.cat((v, layout.values[stream, slots.flatten()]))
            seen = (row[:, None] >= entries % ENTRY).repeat_interleave(config.page_size, 1)
            visible = torch.cat((visible, seen), 1)
            if config.summarises(size) and job.features is not None and layout.mean_values is not None:
                pages = closed * config.pages_per_chunk
                moments = KeptMoments(job.features[stream, None, :pages], config.page_size)
                scorer = Scorer(job.scale, job.softcap)
                logits = summary_logits(q[None], moments, scorer)[0]
                block = Block(rows.start, rows.stop, closed)
                logits = logits.masked_fill(plan.seen(block, pages)[chooser], -torch.inf)
                means = layout.mean_values[stream, :pages]
        exact, rough = (
            plain_attention(q, k, v, visible, logits, means, job.scale, dtype)
            for dtype in (torch.float64, job.queries.dtype)
        )
        got = outs[chooser, :, rows].double()
        worst = max(worst, float((got - exact).norm() / exact.norm()))
        plain = max(plain, float((rough - exact).norm() / exact.norm()))
    if not worst <= 1.5 * plain + 1e-3:
        raise SurgeryError(f"wrong answer: error {worst:.2e}, plain low precision {plain:.2e}.")
    return worst, plain


def check_selection(job: Job, plans: list[TiledPlan]) -> float:
    """Share of decisions of sampled tiles that differ from float32 selection from the same moments.

    A page whose share is within 10% of θ may differ.

    Raises:
        SurgeryError: Another page differs.
    """
    config, layout, size, bar = job.config, job.layout, job.tile, math.log(job.config.theta)
    differing = decisions = 0
    assert layout is not None
    for plan in plans:
        for index in (0, plan.counts.shape[1] // 2, plan.counts.shape[1] - 1):
            tile = plan.start // size + index
            closed = closed_chunks(tile * size, config, size)
            if not closed:
                continue
            chooser = index % len(plan.counts)
            stream = chooser // job.group
            rows = slice(tile * size, (tile + 1) * size)
            pages = closed * config.pages_per_chunk
            q = job.queries[chooser, :, rows].float() * job.scale
            scorer = Scorer(1.0)
            one = slice(stream, stream + 1)
            moments = Moments(
                layout.moments.mean[one, :pages], layout.moments.variance[one, :pages], config.page_size
            )
            scores, weights = scorer(q, moments)
            first = closed * config.chunk_size
            key = torch.arange(first, tile * size + size, device=q.device)
            near = q @ job.near_keys[stream, first : tile * size + size].float().T
            position = torch.arange(rows.start, rows.stop, device=q.device)
            near = near.masked_fill(key[None] > position[:, None], -math.inf)
            total = torch.cat((weights, near), -1).logsumexp(-1, keepdim=True)
            by_row = (scores - total).amax(0)  # over the chooser's heads
            clear = (by_row.amax(0) - bar).abs() > 0.1
            wanted = by_row.amax(0) > bar
            wanted[layout.sink_pages(config.page_size)[stream]] = True
            got = torch.zeros_like(wanted)
            entries = plan.entries[chooser, index, : plan.counts[chooser, index]]  # type: ignore[index]
            got[entries.long() // ENTRY] = True
            if bool(((got != wanted) & clear).any()):
                raise SurgeryError(f"wrong pages in tile {tile} of chooser {chooser}.")
            differing += int((got != wanted).sum())
            decisions += int(wanted.sum())
    return differing / max(1, decisions)


def scattered_plans(job: Job, plans: list[TiledPlan], density: float) -> list[TiledPlan]:
    """As many pages for every tile as visible ones allow at this density, spread at random."""
    share = density * causal_pairs(0, job.stop) / sum(
        job.tile * job.config.page_size * strip.tiles * 0.5 * (strip.pages + first)
        for strip, first in (
            (s, job.pages_of(s.first_tile)) for s in job.strips() if s.pages
        )
    )  # fmt: skip
    made, choosers = [], len(job.queries)
    for strip, plan in zip((s for s in job.strips() if s.pages), plans, strict=True):
        closed = [job.pages_of(strip.first_tile + t) for t in range(strip.tiles)]
        pages = torch.tensor(closed, device=plan.counts.device)
        counts = (pages * min(1.0, share)).round().clamp_min(1).minimum(pages).int()
        most = int(counts.max())
        place = torch.arange(most, device=pages.device)
        jitter = torch.rand(choosers, strip.tiles, most, device=pages.device)
        width = pages / counts.clamp_min(1)
        page = ((place + jitter) * width[:, None]).int().minimum((pages - 1).clamp_min(0)[:, None])
        opened = torch.randint(0, job.tile // 2, page.shape, device=pages.device)
        entries = torch.zeros_like(plan.entries)  # type: ignore[arg-type]
        entries[..., :most] = (page * ENTRY + opened).int()
        counts = counts.expand(choosers, -1).contiguous()
        made.append(dataclasses.replace(plan, counts=counts, entries=entries))
    return made


def flex_call(job: Job, plans: list[TiledPlan]) -> Callable[[], torch.Tensor]:
    """FlexAttention on the same pages: tree-ordered far keys, then all keys in order of position."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    config, layout, size, page = job.config, job.layout, job.tile, job.config.page_size
    assert layout is not None
    device, length = job.queries.device, job.stop
    far_keys = layout.keys.shape[1]
    tiles, far_pages, near_pages = length // size, far_keys // page, -(-length // page)
    choosers = len(job.queries)
    full = torch.zeros(choosers, tiles, far_pages + near_pages, dtype=torch.int32, device=device)
    full_count = torch.zeros(choosers, tiles, dtype=torch.int32, device=device)
    for plan in plans:
        at = slice(plan.start // size, plan.start // size + plan.counts.shape[1])
        entries = plan.entries
        assert entries is not None
        listed = torch.arange(entries.shape[-1], device=device) < plan.counts[..., None]
        full[:, at, : entries.shape[-1]] = (entries // ENTRY).where(listed, 0)
        full_count[:, at] = plan.counts
    # Near pages that lie before the tile are full, those with the diagonal are partial.
    anchor = torch.arange(tiles, device=device) * size
    first = (anchor - config.window).clamp_min(0) // config.chunk_size * config.chunk_size
    whole = (anchor - first) // page
    most = int(whole.max())
    step = torch.arange(most, device=device)
    spot = full_count[..., None].long() + step
    near = (far_pages + first // page)[:, None] + step
    for chooser in range(choosers):
        tile, j = torch.nonzero(step < whole[:, None], as_tuple=True)
        full[chooser, tile, spot[chooser, tile, j]] = near[tile, j].int()
    full_count += whole.int()
    partial = torch.zeros(1, 1, tiles, far_pages + near_pages, dtype=torch.int32, device=device)
    begin, end = first // page + whole, (anchor + size - 1) // page
    spans = int((end - begin + 1).max())
    partial[0, 0, :, :spans] = (far_pages + begin[:, None] + torch.arange(spans, device=device)).int()
    partial_count = (end - begin + 1).int()[None, None]

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv - far_keys <= q

    streams = len(layout.keys)
    by_head = (streams, choosers // streams)
    mask = BlockMask.from_kv_blocks(
        partial_count.expand(*by_head, -1).contiguous(),
        partial.expand(*by_head, -1, -1).contiguous(),  # the kernel takes its strides for the full ones
        full_count.unflatten(0, by_head),
        full.unflatten(0, by_head),
        BLOCK_SIZE=(size, page),
        mask_mod=visible,
        seq_lengths=(length, far_keys + near_pages * page),
        compute_q_blocks=False,
    )
    pad = near_pages * page - length
    keys, values = (
        torch.cat((a, torch.nn.functional.pad(b, (0, 0, 0, pad))), 1)[:, None]
        for a, b in ((layout.keys, job.near_keys), (layout.values, job.near_values))
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    queries = job.queries.reshape(streams, -1, length, job.queries.shape[-1])
    options = {"BLOCK_M": min(size, 128), "BLOCK_N": min(page, 128)}

    def call() -> torch.Tensor:
        return compiled(queries, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)

    return call
