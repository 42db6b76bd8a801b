"""Which far pages a row opens: scores from moments, shares of the whole row, first-open rows."""

import dataclasses
import math
from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.plan import Plan, plan_from_first_open, plan_of_everything, tiles_of
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The page score of one layer, and what pages are expected to weigh.

    ``score(q, P) = log|P| + s·(q·μ) + r(t)`` with ``t = ½·s²·(q²·σ²)``: what |P| normal logits of variance
    2t weigh. While ``t < log|P|`` r is t, the diagonal second-order expansion of ``log Σ_{k in P}
    exp(s·q·k)``. Beyond, that counts on logits so rare that a page has none of them: the free energy of the
    random energy model, 2·√(t·log|P|) − log|P| (Derrida, Phys. Rev. B 24, 2613, 1981), takes its place. The
    weight has ``√(1 + 2t) − 1`` in place of r: it is t while that is small, and within 0.31 of ``log cosh
    √(2t)``, which is exact for two equally large groups of keys on both sides of their mean. In r the same
    root stands for √(2t), which makes one root do: ``r(t) = m + √(2m)·(√(1 + 2t) − √(1 + 2m))`` beyond
    ``m = log|P|``. What is opened may err high; what is counted unread, rather low: it makes up the row's
    total. Where logits are capped, ``c·tanh(x / c)``, mean and slope pass through the cap (delta method).

    Attributes:
        scale: s, the module's own scaling of q·k.
        softcap: c, or None.
        router: Learned corrections, one for every stream, or None.
    """

    scale: float
    softcap: float | None = None
    router: PageRouter | None = None

    def __call__(self, queries: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and weight of every page, logarithms, (streams, rows, pages) each, the moments' dtype.

        ``queries`` are (streams, rows, head_dim), rows of all heads of the group.
        """
        queries = queries.to(moments.mean.dtype) * self.scale
        spread = queries.square() * 0.5
        if self.router is not None:
            queries, spread = self.router.weigh(queries, spread)
        linear = queries @ moments.mean.transpose(1, 2)
        quadratic = spread @ moments.variance.transpose(1, 2)
        if self.softcap is not None:
            capped = torch.tanh(linear / self.softcap)
            linear, quadratic = self.softcap * capped, quadratic * (1 - capped.square()).square()
        root = (1 + 2 * quadratic.clamp_min(0)).sqrt()
        linear, most = linear + math.log(moments.size), math.log(moments.size)
        reached = most + math.sqrt(2 * most) * (root - math.sqrt(1 + 2 * most))
        return linear + torch.where(quadratic < most, quadratic, reached), linear + root - 1


def score_pages(
    queries: torch.Tensor, layout: Layout, block: Block, config: SurgeryConfig, scorer: Scorer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and weights of a block's closed pages: (streams, heads, rows, pages) each.

    ``queries`` are (streams, heads, rows, head_dim), the block's rows.
    """
    moments = layout.moments.first(block.closed * config.pages_per_chunk)
    scores, weights = scorer(queries.flatten(1, 2), moments)
    return scores.unflatten(1, queries.shape[1:3]), weights.unflatten(1, queries.shape[1:3])


def log_shares(
    scores: torch.Tensor,
    weights: torch.Tensor,
    near_lse: torch.Tensor,
    sink_logit: torch.Tensor | None,
    scorer: Scorer,
) -> torch.Tensor:
    """Log of each page's expected share of the row's whole attention, less the head's learned offset.

    Args:
        scores, weights: (streams, heads, rows, pages); weights are what the pages weigh in the row's total.
        near_lse: (streams, heads, rows), log-sum-exp of the near field's logits.
        sink_logit: (streams, heads) attention-sink parameters, or None.

    Returns:
        (streams, heads, rows, pages).
    """
    total = torch.logaddexp(weights.logsumexp(-1), near_lse.to(weights.dtype))
    if sink_logit is not None:
        total = torch.logaddexp(total, sink_logit.to(scores.dtype)[..., None])
    if scorer.router is not None and scorer.router.offset is not None:
        total = total + scorer.router.offset.to(total.dtype)[..., None]
    return scores - total.unsqueeze(-1)


def select(
    queries: torch.Tensor,
    layout: Layout,
    near_lse: torch.Tensor,
    block: Block,
    *,
    config: SurgeryConfig,
    tile: int,
    scorer: Scorer,
    sink_logit: torch.Tensor | None = None,
    scored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Plan:
    """Plan one block of rows.

    Row r of a tile opens a page for a head when its expected share in that head exceeds θ; in tiles of one
    row, for all heads of the group when it does in some. The tile reads the union; row r sees what rows ≤ r
    opened (law 2). The sink page is open from the first row.

    Args:
        queries: (streams, heads, rows, head_dim), the block's rows.
        layout: At least ``block.closed`` chunks.
        near_lse: (streams, heads, rows) from the near field's pass.
        block: With at least one closed chunk.
        config: Rule and θ.
        tile: Queries of a tile, ``config.tile`` or 1.
        scorer: The layer's page score.
        sink_logit: (streams, heads) attention-sink parameters of models that have them.
        scored: From :func:`score_pages`, where it was asked already.

    Returns:
        A plan of as many choosers as there are heads in all, or streams if ``tile`` is 1.
    """
    streams, heads = queries.shape[:2]
    choosers = 1 if tile == 1 else heads
    sinks = layout.sink_pages(config.page_size).long()
    if config.theta_for(tile) == 0:
        # Nothing to choose: no page needs a score.
        pages = block.closed * config.pages_per_chunk
        return plan_of_everything(block, tile, pages, sinks.repeat_interleave(choosers))
    rows = torch.arange(block.start, block.stop, device=queries.device)
    opening = math.log(config.theta_for(tile))
    whole = _TileRows(rows, block, tile)
    scores, weights = scored or score_pages(queries, layout, block, config, scorer)
    shares = log_shares(scores, weights, near_lse, sink_logit, scorer)
    shares = whole.embed(shares.flatten(0, 1), -math.inf).unflatten(0, (streams, heads))
    opened = (shares > opening).unflatten(1, (choosers, -1)).any(2).flatten(0, 1)
    place = whole.embed((rows % tile).to(torch.int16)[None, :, None], tile)
    first_open = torch.where(opened, place, tile).amin(2).long()
    sink = sinks.repeat_interleave(choosers)[:, None, None].expand(-1, whole.tiles, 1)
    return plan_from_first_open(first_open.scatter_(-1, sink, 0), block, tile)


class _TileRows(NamedTuple):
    """Where a block's rows lie in the whole tiles that the block touches."""

    rows: torch.Tensor
    block: Block
    tile: int

    @property
    def tiles(self) -> int:
        return tiles_of(self.block, self.tile)

    def embed(self, values: torch.Tensor, absent: float) -> torch.Tensor:
        """(choosers, rows, pages) to (choosers, tiles, rows of a tile, pages)."""
        if values.shape[1] != self.tiles * self.tile:
            place = self.rows - self.block.start // self.tile * self.tile
            shape = (values.shape[0], self.tiles * self.tile, values.shape[2])
            values = values.new_full(shape, absent).index_copy_(1, place, values)
        return values.unflatten(1, (self.tiles, self.tile))
