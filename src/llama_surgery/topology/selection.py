"""Which far pages a row opens: scores from moments, shares of the whole row, first-open rows."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.layout import Layout, Moments, pool_channels
from llama_surgery.topology.plan import Plan, plan_from_first_open, plan_of_everything, tiles_of
from llama_surgery.topology.router import PageRouter

#: Called with the log shares (streams, heads, tiles, rows of a tile, pages), -inf for rows outside the block
#: and 0 for the page that is always open, and the block: how calibration listens.
ShareListener = Callable[[torch.Tensor, Block], None]

#: Least variance term that a root is taken of: its derivative stays finite.
_LEAST = 1e-8


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The page score of one layer.

    ``score(q, B) = log|B| + s·(q·μ) + bounded(t)`` with ``t = ½·s²·(q²·σ²)``: the diagonal second-order
    expansion of ``log Σ_{k in B} exp(s·q·k)``, its variance term put in bounds by
    :func:`bounded_variance_term`. Where logits are capped, ``c·tanh(x / c)``, mean and slope pass through the
    cap (delta method).

    Attributes:
        scale: s, the module's own scaling of q·k.
        softcap: c, or None.
        router: Learned corrections, one for every stream, or None.
        pool: Channels whose variances are averaged: σ² of each is then the mean over them.
    """

    scale: float
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
        linear, quadratic = self._terms(queries, spread, moments.mean, variance)
        return linear + (bounded_variance_term(quadratic, moments.size) + math.log(moments.size))

    def weights(self, queries: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Log of what every ball weighs, where it stands in for its keys.

        The score with another bound on its variance term t: ``log cosh √(2t)``, which is t while that is
        small and is exact for two equally large groups of keys on both sides of their mean. What keys can
        reach at most is right for opening a page rather than missing one, but where nothing is opened it
        would give balls more than almost all of them weigh.

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
        spread = queries.square() * 0.5
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


def bounded_variance_term(term: torch.Tensor, size: int) -> torch.Tensor:
    """The second-order variance term ½v of a ball's score, at most what ``size`` keys can reach.

    ½v is what normally distributed logits of variance v add to their mean. It grows without end: a wide ball
    of a sharp head would promise e^14 times what its keys can weigh, and the row's total, and so every share,
    would be wrong by as much. Keys are finitely many: of b logits with a given mean and variance those add
    most that are one outlier among equals, ``log((1/b)·e^√((b-1)v) + ((b-1)/b)·e^-√(v/(b-1)))``.
    The smaller of the two is returned: ½v while v is small.

    Args:
        term: ½v, any shape; below 0 (learned weights may be) it is returned as it is.
        size: b, keys of a ball.
    """
    if size == 1:
        return term
    root = (2 * (size - 1) * term).clamp_min(_LEAST).sqrt()
    rest = (size - 1) * torch.exp(root * (-size / (size - 1)))
    return torch.minimum(term, root + torch.log1p(rest) - math.log(size))


def log_shares(
    scores: torch.Tensor, near_lse: torch.Tensor, sink_logit: torch.Tensor | None, scorer: Scorer
) -> torch.Tensor:
    """Log of each ball's expected share of the row's whole attention, less the head's learned offset.

    Args:
        scores: (streams, heads, rows, balls), consumed; -inf where a ball does not count.
        near_lse: (streams, heads, rows), log-sum-exp of the near field's logits.
        sink_logit: (streams, heads) attention-sink parameters, or None.
        scorer: Knows the heads' learned offsets.

    Returns:
        (streams, heads, rows, balls).
    """
    total = torch.logaddexp(scores.logsumexp(-1), near_lse.to(scores.dtype))
    if sink_logit is not None:
        total = torch.logaddexp(total, sink_logit.to(scores.dtype)[..., None])
    if scorer.router is not None and scorer.router.offset is not None:
        total = total + scorer.router.offset.to(total.dtype)[..., None]
    return scores.sub_(total.unsqueeze(-1))


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
        listener: Hears the log shares.

    Returns:
        A plan of as many choosers as there are heads in all, or streams if ``tile`` is 1.
    """
    streams, heads = queries.shape[:2]
    choosers = 1 if tile == 1 else heads
    sinks = layout.sink_pages(config.page_size)
    if config.theta_for(tile) == 0 and listener is None:
        # Nothing to choose: no page needs a score.
        pages = block.closed * config.pages_per_chunk
        return plan_of_everything(block, tile, pages, sinks.repeat_interleave(choosers))
    rows = torch.arange(block.start, block.stop, device=queries.device)
    moments = layout.moments.first(block.closed * config.balls_per_chunk)
    theta = config.theta_for(tile)
    opening = math.log(theta) if theta > 0 else -math.inf
    whole = _TileRows(rows, block, tile)
    scores = _page_scores(queries, moments, scorer, config)
    shares = log_shares(scores, near_lse, sink_logit, scorer)
    shares = whole.embed(shares.flatten(0, 1), -math.inf).unflatten(0, (streams, heads))
    if listener is not None:
        sink = sinks[:, None, None, None, None].expand(*shares.shape[:4], 1)
        listener(shares.scatter(-1, sink, 0.0), block)
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


def _page_scores(
    queries: torch.Tensor, moments: Moments, scorer: Scorer, config: SurgeryConfig
) -> torch.Tensor:
    """Scores of pages: the log-sum-exp of the scores of their balls."""
    scores = scorer(queries.flatten(1, 2), moments).unflatten(1, queries.shape[1:3])
    if config.balls_per_page == 1:
        return scores
    return scores.unflatten(-1, (-1, config.balls_per_page)).logsumexp(-1)
