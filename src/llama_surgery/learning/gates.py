"""Attention through soft page gates: dense at the start of a homotopy, the operated layer at its end.

A page's logits get the bias ``λ·log σ(margin / τ)``. The margin of a page for a row of a head is the
largest, over the rows up to that one of the tile, of log share − log θ − the head's offset: what the row
sees, as topology/selection.py decides it, made soft. In tiles of one row it is the largest over the heads
of the group. λ goes from 0, where the layer is the dense one, to 1, then τ to hard.
"""

import dataclasses
import math
from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.learning.soft_tree import Pages
from llama_surgery.topology.router import PageRouter
from llama_surgery.topology.selection import Scorer

#: A bias that leaves no weight, and finite: gradients of log-sum-exp's over nothing else are not numbers.
NOTHING = -1e4


@dataclasses.dataclass(frozen=True)
class Homotopy:
    """Where between the dense and the operated layer.

    Attributes:
        strength: λ.
        temperature: τ, in nats of log share; 0 is the operated layer itself.
    """

    strength: float
    temperature: float


class Rows(NamedTuple):
    """Whole tiles of one block, in ascending order.

    Attributes:
        position: (rows,) int64.
        closed: Closed chunks of all of them.
        stop: One past the last key that any row of the block sees.
    """

    position: torch.Tensor
    closed: int
    stop: int


class Gated(NamedTuple):
    """What :func:`gated_rows` returns.

    Attributes:
        out: (streams, heads, rows, value_dim).
        soft: (streams,) expected executed far pairs, mean over heads, with gradient.
        hard: (streams,) the same at τ = 0, without.
        slope: (streams,) derivative of ``soft`` in log θ, without gradient.
        lost: (streams,) expected attention on pages that the rows do not see at τ = 0, mean over heads,
            summed over rows, without gradient.
    """

    out: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    slope: torch.Tensor
    lost: torch.Tensor


def gated_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: Pages | None,
    router: PageRouter,
    rows: Rows,
    log_theta: float,
    homotopy: Homotopy,
    config: SurgeryConfig,
    scale: float,
) -> Gated:
    """Attention of some tiles of a block.

    Args:
        queries: (streams, heads, rows, head_dim).
        keys: (streams, n, head_dim), all keys in order of position.
        values: (streams, n, value_dim).
        tree: Of at least ``rows.closed`` chunks; None where no chunk is closed.
        router: Corrections with a leading dimension of streams, with gradient.
        rows: Which rows.
        log_theta: Global log θ.
        homotopy: λ and τ.
        config: Geometry and tile.
        scale: Scaling of q·k.
    """
    streams, heads, count, _ = queries.shape
    keys, values = keys[:, : rows.stop], values[:, : rows.stop]
    logits = (queries.flatten(1, 2) * scale) @ keys.transpose(1, 2)
    logits = logits.unflatten(1, (heads, count))
    far = rows.closed * config.chunk_size
    hidden = torch.arange(far, rows.stop, device=keys.device) > rows.position[:, None]
    if tree is None or rows.closed == 0:
        out = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1).flatten(1, 2) @ values
        nothing = logits.new_zeros(streams)
        return Gated(out.unflatten(1, (heads, count)), nothing, nothing, nothing, nothing)

    near_lse = logits[..., far:].masked_fill(hidden, -torch.inf).logsumexp(-1)
    pages = rows.closed * config.pages_per_chunk
    found = Scorer(scale, None, router)(queries.flatten(1, 2), tree.moments.first(pages))
    scores, weights = (x.unflatten(1, (heads, count)) for x in found)
    sink = tree.member[:, 0, 0].detach() > 0.5  # the first chunk's page that holds position 0
    sink = torch.nn.functional.pad(sink, (0, pages - sink.shape[1]))
    bias, *pairs = page_gates(scores, weights, near_lse, sink, router, log_theta, homotopy, config)
    by_chunk = bias.flatten(1, 2).unflatten(-1, (rows.closed, -1)).transpose(1, 2)
    # Keys are in order of position: membership carries a page's bias to its keys, and gradients back.
    member = tree.member[:, : rows.closed].transpose(-1, -2)
    by_key = (by_chunk @ member.to(bias.dtype)).transpose(1, 2).flatten(2).unflatten(1, bias.shape[1:3])
    if homotopy.temperature == 0:
        by_key = torch.zeros_like(by_key).masked_fill(by_key < 0, -torch.inf)
    causal = logits[..., far:].masked_fill(hidden, -torch.inf)
    logits = torch.cat((logits[..., :far] + by_key.to(logits.dtype), causal), -1)
    if config.summary != "none":
        terms = summary_terms(weights, bias, router)
        means = (member.to(values.dtype) @ values[:, :far].unflatten(1, (rows.closed, -1))).flatten(1, 2)
        means = means / config.page_size
        logits, values = torch.cat((terms.to(logits.dtype), logits), -1), torch.cat((means, values), 1)
    weights = torch.softmax(logits, -1)
    out = (weights.flatten(1, 2) @ values).unflatten(1, (heads, count))
    return Gated(out, *pairs)


def page_gates(
    scores: torch.Tensor,
    weights: torch.Tensor,
    near_lse: torch.Tensor,
    sink: torch.Tensor,
    router: PageRouter,
    log_theta: float,
    homotopy: Homotopy,
    config: SurgeryConfig,
) -> tuple[torch.Tensor, ...]:
    """How far pages are open, for whole tiles of rows.

    Args:
        scores: (streams, heads, rows, pages); far below zero where a page's chunk is not closed.
        weights: The same shape, what pages weigh in the row's total; -inf where a chunk is not closed.
        near_lse: (streams, heads, rows).
        sink: (streams, pages) bool, the page that is always open.
        router: Corrections with a leading dimension of streams.
        log_theta: Global log θ.
        homotopy: λ and τ.
        config: Geometry and tile.

    Returns:
        Biases (streams, choosers, rows, pages), a chooser being a head or in tiles of one row all of them;
        then ``soft``, ``hard``, ``slope`` and ``lost`` as :class:`Gated` has them.
    """
    total = torch.logaddexp(weights.logsumexp(-1), near_lse.to(weights.dtype))
    shares = scores - total.unsqueeze(-1)
    expected = shares.detach().exp()
    if router.offset is not None:
        shares = shares - router.offset.to(shares.dtype)[..., None, None]
    if config.tile == 1:
        shares = shares.amax(1, keepdim=True)
    margin = (shares - log_theta).unflatten(2, (-1, config.tile)).cummax(3).values
    # (streams, choosers, tiles, tile, pages)
    sink = sink[:, None, None, None]
    soft, hard, slope = _pairs(margin[:, :, :, -1].masked_fill(sink[:, :, 0], math.inf), homotopy, config)
    seen = ((margin > 0) | sink).flatten(2, 3)
    lost = expected.masked_fill(seen, 0).sum((1, 2, 3)) / scores.shape[1]
    return _bias(margin, sink, homotopy).flatten(2, 3), soft, hard, slope, lost


def summary_terms(weights: torch.Tensor, bias: torch.Tensor, router: PageRouter) -> torch.Tensor:
    """Logits of what stands in for pages, by how far these are closed.

    Args:
        weights: (streams, heads, rows, pages), logs of what the pages are expected to weigh.
        bias: (streams, choosers, rows, pages).
        router: Corrections with a leading dimension of streams.

    Returns:
        (streams, heads, rows, pages), lowered by NOTHING where all is open.
    """
    if router.summary is not None:
        weights = weights + router.summary.to(weights.dtype)[..., None, None]
    # A bias of b leaves a page's keys e^b of their weight; the summary has the rest, and none where b is 0.
    rest = torch.expm1(bias.where(bias < 0, -1.0)).neg().clamp_min(1e-12)
    return weights + rest.log().masked_fill(bias >= 0, NOTHING)


def _bias(margin: torch.Tensor, sink: torch.Tensor, homotopy: Homotopy) -> torch.Tensor:
    """Bias of every page's logits; NOTHING where τ = 0 and the page is closed."""
    if homotopy.temperature == 0:
        return torch.where((margin > 0) | sink, 0.0, NOTHING).to(margin.dtype)
    soft = homotopy.strength * torch.nn.functional.logsigmoid(margin / homotopy.temperature)
    return soft.masked_fill(sink, 0.0)


def _pairs(
    margin: torch.Tensor, homotopy: Homotopy, config: SurgeryConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Executed far pairs, soft and hard, and the slope of the soft ones in log θ.

    Args:
        margin: (streams, choosers, tiles, pages) of the tiles' last rows: a tile reads what any of its rows
            opens.
    """
    each = config.tile * config.page_size / margin.shape[1]
    hard = (margin > 0).sum((1, 2, 3)).double() * each
    if homotopy.temperature == 0:
        return hard.to(margin.dtype), hard, torch.zeros_like(hard)
    gate = torch.sigmoid(margin / homotopy.temperature)
    slope = -(gate * (1 - gate)).detach().sum((1, 2, 3)) / homotopy.temperature
    return gate.sum((1, 2, 3)) * each, hard, slope * each
