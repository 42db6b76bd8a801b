"""Which far pages a row opens: scores from moments, shares of the whole row, first-open rows."""

import dataclasses
import math
from typing import NamedTuple

import torch

from llama_surgery.config import FALL, SurgeryConfig
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
        spread = queries.square()
        if self.router is not None:
            queries, spread = self.router.weigh(queries, spread)
        linear = queries @ moments.mean.transpose(1, 2)
        root = spread @ moments.variance.transpose(1, 2)  # 2t, of which the root is to be made
        if self.softcap is not None:
            capped = torch.tanh(linear / self.softcap)
            linear, root = self.softcap * capped, root * (1 - capped.square()).square()
        # On a CPU every pass over all pages counts, so there are few, and in place. Of the root x, r(t) is
        # ½·x² − ½ below that of t = m, and rises by √(2m) for every unit beyond.
        root = root.add_(1).clamp_min_(1).sqrt_()
        most = math.log(moments.size)
        below, slope = root.clamp_max(math.sqrt(1 + 2 * most)), math.sqrt(2 * most)
        linear = linear.add_(most - 1)
        score = torch.add(linear, root, alpha=slope).addcmul_(below, below, value=0.5)
        return score.add_(below, alpha=-slope).add_(0.5), linear.add_(root)


def score_pages(
    queries: torch.Tensor, layout: Layout, block: Block, config: SurgeryConfig, scorer: Scorer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and weights of a block's closed pages: (streams, heads, rows, pages) each.

    ``queries`` are (streams, heads, rows, head_dim), the block's rows.
    """
    moments = layout.moments.first(block.closed * config.pages_per_chunk)
    scores, weights = scorer(queries.flatten(1, 2), moments)
    return scores.unflatten(1, queries.shape[1:3]), weights.unflatten(1, queries.shape[1:3])


def row_totals(
    pages_lse: torch.Tensor, near_lse: torch.Tensor, sink_logit: torch.Tensor | None, scorer: Scorer
) -> torch.Tensor:
    """Log of what a row's whole attention is expected to weigh, and the head's learned offset.

    A page's score less this total is the log of its expected share.

    Args:
        pages_lse: (streams, heads, rows), log-sum-exp of the weights of the closed pages.
        near_lse: Same shape, log-sum-exp of the near field's logits.
        sink_logit: (streams, heads) attention-sink parameters, or None.

    Returns:
        (streams, heads, rows).
    """
    total = torch.logaddexp(pages_lse, near_lse.to(pages_lse.dtype))
    if sink_logit is not None:
        total = torch.logaddexp(total, sink_logit.to(total.dtype)[..., None])
    if scorer.router is not None and scorer.router.offset is not None:
        total = total + scorer.router.offset.to(total.dtype)[..., None]
    return total


def log_theta(config: SurgeryConfig, tile: int, positions: torch.Tensor) -> torch.Tensor | float:
    """Log θ of rows at ``positions``, in their shape, float32; a number where it is the same for all."""
    theta = math.log(config.theta_for(tile))
    if not config.theta_length:
        return theta
    return theta - FALL * (positions.float() / config.theta_length).clamp_min(1).log()


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
    heads = queries.shape[1]
    choosers = 1 if tile == 1 else heads
    sinks = layout.sink_pages(config.page_size).long()
    if config.theta_for(tile) == 0:
        # Nothing to choose: no page needs a score.
        pages = block.closed * config.pages_per_chunk
        return plan_of_everything(block, tile, pages, sinks.repeat_interleave(choosers))
    rows = torch.arange(block.start, block.stop, device=queries.device)
    opening = log_theta(config, tile, rows)
    whole = _TileRows(rows, block, tile)
    scores, weights = scored or score_pages(queries, layout, block, config, scorer)
    least = row_totals(weights.logsumexp(-1), near_lse, sink_logit, scorer) + opening
    opened = (scores > least.unsqueeze(-1)).unflatten(1, (choosers, -1))
    opened = (opened.any(2) if choosers < heads else opened.squeeze(2)).flatten(0, 1)
    opened = whole.embed(opened, False)
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

    def embed(self, values: torch.Tensor, absent: int) -> torch.Tensor:
        """(choosers, rows, pages) to (choosers, tiles, rows of a tile, pages)."""
        if values.shape[1] != self.tiles * self.tile:
            place = self.rows - self.block.start // self.tile * self.tile
            shape = (values.shape[0], self.tiles * self.tile, values.shape[2])
            values = values.new_full(shape, absent).index_copy_(1, place, values)
        return values.unflatten(1, (self.tiles, self.tile))
