"""A layer through its gates by Triton kernels: what gates.py computes, for GPUs and whole windows."""

import importlib
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llama_surgery.attention.executor import build_layout, kernels_serve, resolve
from llama_surgery.attention.impl.common import merge
from llama_surgery.config import SurgeryConfig
from llama_surgery.learning.gates import NOTHING, Gated, Homotopy, page_gates, summary_terms
from llama_surgery.topology.geometry import closed_chunks, first_far
from llama_surgery.topology.layout import Moments, mean_values, moments_of, reorder
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import Scorer

#: Numbers of gates (rows × heads × pages) that are made at a time, and made again in the backward pass.
GATES = 1 << 26


def serves(keys: torch.Tensor, values: torch.Tensor, router: PageRouter, config: SurgeryConfig) -> bool:
    """Do the kernels compute the gates of a layer? Not where the tree is learned, which they do not know.

    Args:
        keys: (streams, n, head_dim).
        values: (streams, n, value_dim).
        router: The layer's corrections.
        config: Geometry, tile and backend.
    """
    if router.key_map is not None or not kernels_serve(config, keys, values):
        return False
    return _kernels().obstacle(config) is None


def gated_window(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    router: PageRouter,
    log_theta: float,
    homotopy: Homotopy,
    config: SurgeryConfig,
    scale: float,
) -> tuple[torch.Tensor, list[Gated]]:
    """All rows of a window; gates are computed in float32, products in the states' dtype.

    Args:
        queries: (streams, heads, n, head_dim), n a multiple of the tile.
        keys: (streams, n, head_dim), all keys in order of position.
        values: (streams, n, value_dim).
        router: Corrections with a leading dimension of streams, with gradient.
        log_theta: Global log θ.
        homotopy: λ and τ.
        config: Geometry and tile.
        scale: Scaling of q·k.

    Returns:
        (streams, heads, n, value_dim) in the queries' dtype, and the readings of some rows after the other.
    """
    call = resolve(config, queries.detach(), values.detach(), config.tile, scale=scale)
    out, near_lse = _kernels().near_field(call, queries, keys, values)
    n, begin = queries.shape[2], first_far(config)
    if n <= begin:
        return out, []
    full = n // config.chunk_size * config.chunk_size
    keys, values = keys[:, :full], values[:, :full]
    with torch.no_grad():
        laid = build_layout(keys, values, config, router)
    keys, values = reorder(keys, laid.order), reorder(values, laid.order)
    sinks = laid.sink_pages(config.page_size)
    far = keys, values, moments_of(keys, config.page_size), mean_values(values, config), sinks
    outs, readings = [out[:, :, :begin]], []
    while begin < n:
        pages = closed_chunks(n - 1, config, config.tile) * config.pages_per_chunk
        most = GATES // (queries.shape[:2].numel() * pages) // config.tile * config.tile
        rows = slice(begin, min(n, begin + max(config.tile, most)))
        gated = checkpoint(
            _rows,
            call,
            queries[:, :, rows],
            out[:, :, rows],
            near_lse[:, :, rows],
            far,
            router,
            begin,
            log_theta,
            homotopy,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random in it
        )
        outs.append(gated.out.to(queries.dtype))
        readings.append(gated)
        begin = rows.stop
    return torch.cat(outs, 2), readings


def _rows(
    call: Any,
    queries: torch.Tensor,
    near_out: torch.Tensor,
    near_lse: torch.Tensor,
    far: tuple[torch.Tensor, torch.Tensor, Moments, torch.Tensor | None, torch.Tensor],
    router: PageRouter,
    start: int,
    log_theta: float,
    homotopy: Homotopy,
) -> Gated:
    """Rows from ``start`` on, of which each has a closed chunk."""
    keys, values, moments, means, sink = far
    config, rows = call.config, queries.shape[2]
    tiles = range(start, start + rows, config.tile)
    pages = torch.tensor([closed_chunks(p, config, config.tile) for p in tiles], dtype=torch.int32)
    most = int(pages[-1]) * config.pages_per_chunk
    pages = (pages * config.pages_per_chunk).to(queries.device, non_blocking=True)
    place = torch.arange(most, device=queries.device)
    absent = (place >= pages[:, None]).repeat_interleave(config.tile, 0)[:rows]  # (rows, pages)
    found = Scorer(call.scale, None, router)(queries.flatten(1, 2), moments.first(most))
    scores, weights = (x.unflatten(1, queries.shape[1:3]) for x in found)
    scores, weights = scores.masked_fill(absent, NOTHING), weights.masked_fill(absent, -torch.inf)
    always = place == sink[:, None]
    bias, *pairs = page_gates(scores, weights, near_lse, always, router, log_theta, homotopy, config)
    far_out, far_lse = _kernels().far_field(call, queries, keys, values, bias, start)
    out, lse = merge(near_out.float(), near_lse, far_out, far_lse)
    if means is not None:
        terms = summary_terms(weights, bias, router)
        mean = torch.softmax(terms, -1) @ means[:, :most].unsqueeze(1)
        out, _ = merge(out, lse, mean, terms.logsumexp(-1))
    return Gated(out, *pairs)


def _kernels() -> Any:
    """Loaded when first needed: triton may not be installed."""
    return importlib.import_module("llama_surgery.attention.impl.triton.gated.launch")
