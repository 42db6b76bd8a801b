"""Which far pages a row opens: scores from moments, shares of the whole row, first-open rows."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.layout import Layout, Moments, merge_moments, pool_channels
from llama_surgery.topology.plan import Plan, plan_from_first_open, plan_of_everything, tiles_of
from llama_surgery.topology.router import PageRouter

#: Called with the log shares (streams, tiles, scored rows of a tile, pages), -inf for rows outside the
#: block and 0 for the page that is always open, and the block: how calibration listens.
ShareListener = Callable[[torch.Tensor, Block], None]


#: Share of θ that a ball must promise by its own moments for what it holds to be looked at (coarse to fine).
CANDIDATE_SHARE = 0.25
#: Least variance term that a root is taken of: its derivative stays finite.
_LEAST = 1e-8


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The page score of one layer.

    ``score(q, B) = log|B| + s·(q·μ) + α·½·s²·(q²·σ²)``: the diagonal second-order expansion of
    ``log Σ_{k in B} exp(s·q·k)``. Where logits are capped, ``c·tanh(x / c)``, mean and slope pass through
    the cap (delta method).

    Attributes:
        scale: s, the module's own scaling of q·k.
        alpha: α, weight of the variance term.
        softcap: c, or None.
        router: Learned corrections, one for every stream, or None.
        pool: Channels whose variances are averaged: σ² of each is then the mean over them.
    """

    scale: float
    alpha: float = 1.0
    softcap: float | None = None
    router: PageRouter | None = None
    pool: int = 1

    def __call__(self, queries: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Scores of every ball.

        Args:
            queries: (streams, rows, head_dim), rows of all heads of the group.
            moments: Of the balls.

        Returns:
            (streams, rows, balls), the moments' dtype.
        """
        queries, spread, variance = self._factors(queries, moments)
        if self.softcap is None:
            # One matrix product of [q, q²] with [μ, ½σ²].
            features = torch.cat((moments.mean, variance), -1).transpose(1, 2)
            scores = torch.cat((queries, spread), -1) @ features
        else:
            scores = torch.add(*self._terms(queries, spread, moments.mean, variance))
        return scores.add_(math.log(moments.size))

    def weights(self, queries: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Log of what every ball weighs, where it stands in for its keys.

        The score with its variance term t put in bounds: ``log cosh √(2t)``, which is t while that is small
        and is exact for two equally large groups of keys on both sides of their mean. The second-order term
        itself grows without end: right for opening a page rather than missing one, but where nothing is
        opened it gives balls more than their largest key could.

        Args:
            queries: (streams, rows, head_dim), rows of all heads of the group.
            moments: Of the balls.

        Returns:
            (streams, rows, balls), the moments' dtype.
        """
        queries, spread, variance = self._factors(queries, moments)
        mean, variance = self._terms(queries, spread, moments.mean, variance)
        root = (2 * variance).clamp_min(_LEAST).sqrt()
        bounded = root + torch.log1p(torch.exp(-2 * root)) - math.log(2)
        return mean + bounded + math.log(moments.size)

    def _factors(
        self, queries: torch.Tensor, moments: Moments
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What multiplies means and variances, with the learned weights of channels, and the variances."""
        queries = queries.to(moments.mean.dtype) * self.scale
        spread = queries.square() * (0.5 * self.alpha)
        if self.router is not None:
            queries, spread = self.router.weigh(queries, spread)
        variance = pool_channels(moments.variance, self.pool) / self.pool
        return queries, pool_channels(spread, self.pool), variance

    def _terms(
        self, queries: torch.Tensor, spread: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance term of every ball, through the cap if there is one."""
        linear, quadratic = queries @ mean.transpose(1, 2), spread @ variance.transpose(1, 2)
        if self.softcap is None:
            return linear, quadratic
        capped = torch.tanh(linear / self.softcap)
        return self.softcap * capped, quadratic * (1 - capped.square()).square()

    def largest(self, shares: torch.Tensor) -> torch.Tensor:
        """Log shares (streams, heads, rows, balls), consumed, less the heads' learned offsets: the largest
        over the heads, (streams, rows, balls)."""
        if self.router is not None and self.router.offset is not None:
            shares = shares.sub_(self.router.offset.to(shares.dtype)[..., None, None])
        return shares.amax(1)


def log_shares(
    scores: torch.Tensor, near_lse: torch.Tensor, sink_logit: torch.Tensor | None, scorer: Scorer
) -> torch.Tensor:
    """Log of each ball's expected share of the row's whole attention, largest over the group's heads.

    Args:
        scores: (streams, heads, rows, balls), -inf where a ball does not count.
        near_lse: (streams, heads, rows), log-sum-exp of the near field's logits.
        sink_logit: (streams, heads) attention-sink parameters, or None.
        scorer: Knows the heads' learned offsets.

    Returns:
        (streams, rows, balls).
    """
    total = _total(scores, near_lse, sink_logit)
    return scorer.largest(scores.sub_(total.unsqueeze(-1)))


def _total(scores: torch.Tensor, near_lse: torch.Tensor, sink_logit: torch.Tensor | None) -> torch.Tensor:
    """Log-sum-exp of a row's whole attention, (streams, heads, rows); arguments of :func:`log_shares`."""
    total = torch.logaddexp(scores.logsumexp(-1), near_lse.to(scores.dtype))
    if sink_logit is not None:
        total = torch.logaddexp(total, sink_logit.to(scores.dtype)[..., None])
    return total


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
    listener: ShareListener | None = None,
) -> Plan:
    """Plan one block of rows.

    Row r of a tile opens a page when its expected share, in some head of the group, exceeds θ. The tile
    reads the union; row r sees what rows ≤ r opened (law 2). The sink page is open from the first row.

    Args:
        queries: (streams, heads, rows, head_dim), the block's rows.
        layout: At least ``block.closed`` chunks.
        near_lse: (streams, heads, rows) from the near field's pass.
        block: With at least one closed chunk.
        config: Rule, θ and strides.
        tile: Queries of a tile, ``config.tile`` or 1.
        scorer: The layer's page score.
        sink_logit: (streams, heads) attention-sink parameters of models that have them.
        listener: Hears the log shares.
    """
    if config.theta_for(tile) == 0 and config.pages_per_row is None and listener is None:
        # Nothing to choose: no page needs a score.
        pages = block.closed * config.pages_per_chunk
        return plan_of_everything(block, tile, pages, queries.shape[0], queries.device)
    stride = min(config.score_stride, tile)
    rows = torch.arange(block.start, block.stop, device=queries.device)
    lead = -block.start % stride
    scored: slice | torch.Tensor = slice(lead, None, stride)
    if lead:  # a call that begins between scored rows: its first row opens pages for those up to the next
        scored = torch.cat((rows[:1], rows[scored])) - block.start
    queries, near_lse, rows = queries[:, :, scored], near_lse[:, :, scored], rows[scored]
    moments = layout.moments.first(block.closed * config.pages_per_chunk * config.balls_per_page)
    theta = config.theta_for(tile)
    opening = math.log(theta) if theta > 0 else -math.inf
    whole = _TileRows(rows, block, tile, stride)
    candidate = None
    if config.coarse_to_fine:
        shares, candidate = _descend(queries, moments, near_lse, config, scorer, sink_logit, opening, whole)
    else:
        scores = _page_scores(queries, moments, scorer, config)
        if config.coarse_totals and tile > 1:
            total = _total(_coarse_scores(queries, moments, config, scorer), near_lse, sink_logit)
            scores = scorer.largest(scores.sub_(total.unsqueeze(-1)))
        else:
            scores = log_shares(scores, near_lse, sink_logit, scorer)
        shares = whole.embed(scores, -math.inf)
    if config.pages_per_row is None:
        opened = shares > opening
    else:
        most = min(config.pages_per_row, shares.shape[-1])
        opened = torch.zeros_like(shares, dtype=torch.bool)
        opened.scatter_(-1, shares.topk(most, dim=-1).indices, True)
    if candidate is not None:
        opened &= candidate
    place = whole.embed((rows % tile).to(torch.int16)[None, :, None], tile)
    first_open = torch.where(opened, place, tile).amin(2).long()
    sink = layout.sink_pages(config.page_size)[:, None, None].expand(-1, whole.tiles, 1)
    if listener is not None:
        listener(shares.scatter(-1, sink[:, :, None].expand(*shares.shape[:3], 1), 0.0), block)
    return plan_from_first_open(first_open.scatter_(-1, sink, 0), block, tile)


class _TileRows(NamedTuple):
    """Where a block's scored rows lie in the whole tiles that the block touches."""

    rows: torch.Tensor
    block: Block
    tile: int
    stride: int

    @property
    def tiles(self) -> int:
        return tiles_of(self.block, self.tile)

    def embed(self, values: torch.Tensor, absent: float) -> torch.Tensor:
        """(streams, rows, pages) to (streams, tiles, scored rows of a tile, pages)."""
        per_tile = self.tile // self.stride
        if values.shape[1] != self.tiles * per_tile:
            place = (self.rows - self.block.start // self.tile * self.tile) // self.stride
            shape = (values.shape[0], self.tiles * per_tile, values.shape[2])
            values = values.new_full(shape, absent).index_copy_(1, place, values)
        return values.unflatten(1, (self.tiles, per_tile))


def _scores(queries: torch.Tensor, moments: Moments, scorer: Scorer) -> torch.Tensor:
    heads, rows = queries.shape[1:3]
    return scorer(queries.flatten(1, 2), moments).unflatten(1, (heads, rows))


def _page_scores(
    queries: torch.Tensor, moments: Moments, scorer: Scorer, config: SurgeryConfig
) -> torch.Tensor:
    """Scores of pages: the log-sum-exp of the scores of their balls."""
    scores = _scores(queries, moments, scorer)
    if config.balls_per_page == 1:
        return scores
    return scores.unflatten(-1, (-1, config.balls_per_page)).logsumexp(-1)


def _coarse_scores(
    queries: torch.Tensor, balls: Moments, config: SurgeryConfig, scorer: Scorer
) -> torch.Tensor:
    """Scores of coarse balls of ``coarse_fan`` pages, by their own moments."""
    return _scores(queries, merge_moments(balls, config.balls_per_page * config.coarse_fan), scorer)


def _descend(
    queries: torch.Tensor,
    balls: Moments,
    near_lse: torch.Tensor,
    config: SurgeryConfig,
    scorer: Scorer,
    sink_logit: torch.Tensor | None,
    opening: float,
    whole: _TileRows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log shares of pages and whether each is a candidate at all, coarse to fine.

    Totals come from coarse balls of ``coarse_fan`` pages. A ball is a candidate for a row when, by its own
    moments, some row up to that one of the tile expects more than CANDIDATE_SHARE · θ of it, and the ball
    around it is a candidate; only under candidates is anything finer looked at.

    Returns:
        Both (streams, tiles, scored rows of a tile, pages). Shares are those of all pages.
    """
    bar = opening + math.log(CANDIDATE_SHARE)
    coarse = _coarse_scores(queries, balls, config, scorer)
    total = _total(coarse, near_lse, sink_logit)

    def shares_of(scores: torch.Tensor) -> torch.Tensor:
        return whole.embed(scorer.largest(scores.sub_(total.unsqueeze(-1))), -math.inf)

    candidate = (shares_of(coarse) > bar).cummax(2).values.repeat_interleave(config.coarse_fan, dim=-1)
    shares = shares_of(_page_scores(queries, balls, scorer, config))
    if config.balls_per_page > 1:
        pages = shares_of(_scores(queries, merge_moments(balls, config.balls_per_page), scorer))
        candidate = ((pages > bar) & candidate).cummax(2).values
    return shares, candidate
