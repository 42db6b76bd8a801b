"""Plain PyTorch on any device: gathers the pages of each tile and multiplies only those.

Tiles are batched by how many pages they read, so that little is padded, in groups small enough for their
logits to stay in a processor's cache.
"""

from typing import Any

import torch

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.common import cap, compute_dtype, differentiable, merge, softmax_matmul
from llama_surgery.topology.plan import Plan

#: Logits of one group of tiles, or its keys where they are more, in elements: about a second-level cache on
#: a CPU; more on a GPU, where launches cost more than memory.
GROUP_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 26}

#: Of the longest list of a group, what every other has at least, on a CPU: the rest is padding.
FULL = 0.8

#: Rows of a strip of the near field. Shorter strips multiply fewer masked pairs, longer ones batch better.
STRIP = 128


def near_field(
    call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.blocks.Backend.near_field`."""
    return _attend(queries, keys, values, call.scale, call.softcap, causal=True)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to all keys or, where it is causal and the last keys are the rows' own, to earlier ones."""
    dtype = compute_dtype(queries.dtype)
    _streams, heads, rows, _ = queries.shape
    offset = keys.shape[1] - rows
    if rows > 1 and _fuses(queries, keys, values, softcap):
        return _fused_attend(queries.to(dtype), keys.to(dtype), values.to(dtype), scale, causal=causal)
    keys, values = keys.to(dtype).transpose(1, 2), values.to(dtype)
    outs, lses = [], []
    for start in range(0, rows, STRIP):
        strip = queries[:, :, start : start + STRIP].to(dtype)
        length = strip.shape[2]
        seen = offset + start + length if causal else keys.shape[2]
        # The group's heads fold into rows: they share their keys.
        logits = (strip * scale).flatten(1, 2) @ keys[:, :, :seen]
        logits = cap(logits, softcap).unflatten(1, (heads, length))
        if causal and length > 1:
            hidden = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., seen - length :].masked_fill_(hidden, -torch.inf)
        out, lse = softmax_matmul(logits.flatten(1, 2), values[:, :seen])
        outs.append(out.unflatten(1, (heads, length)))
        lses.append(lse.unflatten(1, (heads, length)))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _fuses(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softcap: float | None) -> bool:
    """Whether PyTorch's own kernel of a CPU does: it has no cap, and no gradients by the log-sum-exp."""
    plain = softcap is None and keys.shape[-1] == values.shape[-1]
    return plain and queries.device.type == "cpu" and not differentiable(queries, keys, values)


def _fused(*states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (batch, heads, rows, value_dim) and log-sum-exp (batch, heads, rows); logits stay out of memory.

    PyTorch's kernel takes the last stride for 1 without looking.
    """
    states = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in states)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, **options)


def _fused_attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_attend` by PyTorch's kernel, rows' own keys apart: its mask begins at the first key."""
    _streams, heads, rows, _ = queries.shape
    keys, values = keys[:, None], values[:, None]
    before = keys.shape[2] - rows if causal else keys.shape[2]
    parts = []
    if before:  # the group's heads fold into rows: they share their keys
        found = _fused(
            queries.flatten(1, 2)[:, None], keys[:, :, :before], values[:, :, :before], scale=scale
        )
        parts.append(tuple(x.squeeze(1).unflatten(1, (heads, rows)) for x in found))
    if causal:
        own = [x[:, :, before:].expand(-1, heads, -1, -1) for x in (keys, values)]
        parts.append(_fused(queries, *own, is_causal=True, scale=scale))
    return parts[0] if len(parts) == 1 else merge(*parts[0], *parts[1])


def far_field(
    call: AttentionCall,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: Plan,
    near: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`llama_surgery.attention.blocks.Backend.far_field`."""
    if plan.everything:  # nothing to gather
        return merge(*near, *_attend(queries, keys, values, call.scale, call.softcap, causal=False))
    dtype, page_size = compute_dtype(queries.dtype), call.config.page_size
    choosers, head_dim = plan.pages.shape[0], queries.shape[-1]
    # A chooser is a head, or all heads of a stream: (choosers, heads of each, rows, head_dim).
    queries = queries.flatten(0, 1).unflatten(0, (choosers, -1))
    heads = queries.shape[1]
    tiled = _to_tiles(queries.to(dtype) * call.scale, plan)  # (choosers * tiles, heads * tile, head_dim)
    pages = plan.pages.clamp_min(0).flatten(0, 1)
    stream = torch.arange(choosers, device=keys.device) // (choosers // len(keys))
    stream = stream.repeat_interleave(plan.tiles)[:, None]
    (flat_keys, key_rows), (flat_values, value_rows) = (_pages(x, page_size) for x in (keys, values))
    first_open = plan.first_open.flatten(0, 1)
    row = torch.arange(plan.tile, device=keys.device)

    # Tiles that read no page are in no group.
    out = tiled.new_zeros(*tiled.shape[:2], values.shape[-1])
    lse = tiled.new_full(tiled.shape[:2], -torch.inf)
    # In tiles of few rows the gathered keys and values are larger than the logits.
    elements = page_size * max(heads * plan.tile, head_dim, values.shape[-1])
    fused = heads == 1 and plan.tile > 1 and _fuses(queries, keys, values, call.softcap)
    for jobs, most in _groups(plan.counts.flatten(), elements, keys.device):
        index, of = pages[jobs, :most], stream[jobs]
        k = flat_keys.index_select(0, (index + of * key_rows).flatten())
        v = flat_values.index_select(0, (index + of * value_rows).flatten())
        k, v = k.view(len(jobs), most * page_size, head_dim), v.view(len(jobs), most * page_size, -1)
        hidden = first_open[jobs, None, :most] > row[:, None]  # (jobs, tile, pages)
        if fused:
            # Low but finite: rows that see none of their tile's pages get a log-sum-exp as low, and no NaN.
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min / 2)
            bias = bias.repeat_interleave(page_size, -1)
            given = [x.to(dtype)[:, None] for x in (tiled[jobs], k, v)]
            part, part_lse = _fused(*given, attn_mask=bias[:, None], scale=1.0)
            out[jobs], lse[jobs] = part.squeeze(1), part_lse.squeeze(1)
            continue
        logits = cap(tiled[jobs] @ k.to(dtype).transpose(1, 2), call.softcap)
        if plan.tile > 1 or index.shape[0] > 1:
            by_page = logits.view(len(jobs), heads, plan.tile, most, page_size)
            by_page.masked_fill_(hidden[:, None, :, :, None], -torch.inf)
        out[jobs], lse[jobs] = softmax_matmul(logits, v.to(dtype))
    far_out = _from_tiles(out, plan, choosers, heads).reshape(near[0].shape)
    far_lse = _from_tiles(lse.unsqueeze(-1), plan, choosers, heads).reshape(near[1].shape)
    return merge(*near, far_out, far_lse)


def _pages(states: torch.Tensor, page_size: int) -> tuple[torch.Tensor, int]:
    """Pages of all streams as rows (…, page_size * dim), and rows from one stream's first to the next's.

    A part of a larger tensor is not copied: its rows are those of the whole.
    """
    streams, keys, dim = states.shape
    row = page_size * dim
    if states.stride()[1:] != (dim, 1) or states.stride(0) % row:
        return states.reshape(-1, row), keys // page_size
    apart = states.stride(0) // row
    return states.as_strided(((streams - 1) * apart + keys // page_size, row), (row, 1)), apart


def _groups(
    counts: torch.Tensor, elements_per_page: int, device: torch.device
) -> list[tuple[torch.Tensor, int]]:
    """Tiles that read pages, by page count, cut into groups: (indices of the tiles, most pages)."""
    limit = GROUP_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    order = counts.argsort(descending=True)
    sorted_counts = counts[order].tolist()
    groups, start = [], 0
    while start < len(sorted_counts) and sorted_counts[start]:
        most = sorted_counts[start]
        stop = min(start + max(1, limit // (most * elements_per_page)), len(sorted_counts))
        while device.type == "cpu" and sorted_counts[stop - 1] < FULL * most:
            stop -= 1
        groups.append((order[start:stop], most))
        start = stop
    return groups


def _to_tiles(states: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(choosers, heads, rows, dim) to (choosers * tiles, heads * tile, dim), absent rows zero."""
    tail = plan.tiles * plan.tile - plan.lead - states.shape[2]
    if plan.lead or tail:
        states = torch.nn.functional.pad(states, (0, 0, plan.lead, tail))
    states = states.unflatten(2, (plan.tiles, plan.tile)).transpose(1, 2)
    return states.flatten(2, 3).flatten(0, 1)


def _from_tiles(states: torch.Tensor, plan: Plan, choosers: int, heads: int) -> torch.Tensor:
    """Inverse of :func:`_to_tiles`: (choosers, heads, rows, dim)."""
    states = states.unflatten(1, (heads, plan.tile)).unflatten(0, (choosers, plan.tiles))
    states = states.transpose(1, 2).flatten(2, 3)
    rows = plan.block.stop - plan.block.start
    return states[:, :, plan.lead : plan.lead + rows]
