"""Attention of one layer under a form of selection, emulated with exact masks: what a form would keep.

Everything is computed from all logits, so a form can also use what no kernel could afford, exact shares.
A form says how pages are scored, which rows and heads choose together, and what stands in for pages that are
not read.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from llama_surgery.topology.tree import tree_order

CHUNK, WINDOW = 512, 192
#: Log of what a page that is open in any case is given.
ALWAYS = 50.0


@dataclasses.dataclass
class Form:
    """A form of selection.

    Attributes:
        name: How it is listed.
        score: What a page is expected to weigh: ``exact`` (its true weight), or from moments of its balls
            ``gaussian``, ``bounded``, ``samples`` (what as many samples of a normal distribution as the
            ball has keys are expected to add), ``logcosh``, ``mean``.
        page, ball: Keys of a page and of the balls it is scored by.
        tile: Consecutive rows that share what they read.
        own: Heads of a group choose each for itself.
        summary: Keys of the runs that stand in for unread pages with their mean value; 0: nothing does.
        weight: What a run weighs: ``logcosh``, ``bounded``, ``exact`` or ``balls`` (its balls' log cosh).
        tree: Keys are sorted by: ``keys``, ``queries`` (keys in the metric of the queries), ``values`` (keys
            and values) or ``both``.
        totals: Keys of the runs whose weights make up a row's total; 0: the pages' scores do.
        totals_term: How these are weighed.
        opens: What is compared with the threshold: a page's ``share``; its share times what a summary is
            expected to miss of it, the root of v / (1 + v) with its logits' variance v (``error``), or also
            times its values' relative spread (``values``).
        falls: Power of a row's position, relative to half of 8,192, by which its threshold falls.
        propose: Density of the pages that the score proposes, and their true shares decide; 0: it decides.
        density: Executed far density that the threshold is set for.
    """

    name: str
    score: str = "bounded"
    page: int = 32
    ball: int = 8
    tile: int = 32
    own: bool = False
    summary: int = 32
    weight: str = "logcosh"
    tree: str = "keys"
    totals: int = 0
    totals_term: str = "logcosh"
    opens: str = "share"
    falls: float = 0.0
    propose: float = 0.0
    density: float = 0.057


@dataclasses.dataclass
class Counts:
    """(query, key) pairs over all heads; a summary's term counts as one."""

    causal: int = 0
    near: int = 0
    summary: int = 0
    far: torch.Tensor | float = 0.0
    proposed: torch.Tensor | float = 0.0


def log_cosh(variance: torch.Tensor) -> torch.Tensor:
    root = variance.clamp_min(1e-8).sqrt()
    return root + torch.log1p(torch.exp(-2 * root)) - math.log(2)


def bounded(term: torch.Tensor, size: int) -> torch.Tensor:
    """½v, at most what ``size`` logits of variance v can add: those of one outlier among equals."""
    if size == 1:
        return term
    root = (2 * (size - 1) * term).clamp_min(1e-8).sqrt()
    rest = (size - 1) * torch.exp(root * (-size / (size - 1)))
    return torch.minimum(term, root + torch.log1p(rest) - math.log(size))


def samples(term: torch.Tensor, size: int) -> torch.Tensor:
    """½v, or √(2v·log n) − log n from v = 2·log n on: n samples do not reach the tail that ½v counts on."""
    most = math.log(size)
    return torch.where(term < most, term, 2 * (term.clamp_min(1e-8) * most).sqrt() - most)


TERMS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "gaussian": lambda variance, _: 0.5 * variance,
    "bounded": lambda variance, size: bounded(0.5 * variance, size),
    "samples": lambda variance, size: samples(0.5 * variance, size),
    "logcosh": lambda variance, _: log_cosh(variance),
    "mean": lambda variance, _: torch.zeros_like(variance),
}


def runs_score(q: torch.Tensor, keys: torch.Tensor, size: int, term: str) -> torch.Tensor:
    """Log of what runs of ``size`` keys weigh: (kv_heads, group, rows, runs)."""
    variance, mean = torch.var_mean(keys.unflatten(1, (-1, size)), 2, correction=0)
    spread = q.square() @ variance[:, None].mT
    return q @ mean[:, None].mT + TERMS[term](spread, size) + math.log(size)


def missed(form: Form, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Log of the part of a page's share that its summary is expected to get wrong: as runs_score."""
    variance = torch.var(keys.unflatten(1, (-1, form.page)), 2, correction=0)
    spread = q.square() @ variance[:, None].mT
    found = 0.5 * (spread / (1 + spread)).clamp_min(1e-8).log()
    if form.opens == "values":
        spreads = torch.var(values.unflatten(1, (-1, form.page)), 2, correction=0).sum(-1)
        size = values.square().sum(-1).mean(1, keepdim=True)
        found = found + 0.5 * (spreads / size)[:, None, None].clamp_min(1e-8).log()
    return found


def page_score(
    form: Form, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, score: str
) -> torch.Tensor:
    """Log of what pages are expected to weigh: (kv_heads, group, rows, pages)."""
    if score == "exact":
        return logits.unflatten(-1, (-1, form.page)).logsumexp(-1)
    scores = runs_score(q, keys, form.ball, score)
    return scores.unflatten(-1, (-1, form.page // form.ball)).logsumexp(-1)


def ordered(form: Form, k: torch.Tensor, v: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of full chunks in tree order, and the page of position 0."""
    keys, values = (x[:, : x.shape[1] // CHUNK * CHUNK].unflatten(1, (-1, CHUNK)) for x in (k, v))
    sorted_by = keys * metric[:, None, None] if form.tree in ("queries", "both") else keys
    if form.tree in ("values", "both"):
        spreads = [
            (x - x.mean(2, keepdim=True)).square().sum(-1, keepdim=True).mean(2, keepdim=True).sqrt()
            for x in (sorted_by, values)
        ]
        sorted_by = torch.cat((sorted_by, values * (0.7 * spreads[0] / spreads[1])), -1)
    order = tree_order(sorted_by, min(form.ball, form.summary or form.ball))
    index = order.unsqueeze(-1)
    keys, values = (x.gather(2, index.expand(x.shape)).flatten(1, 2) for x in (keys, values))
    return keys, values, (order[:, 0] == 0).int().argmax(-1) // form.page


def attend(
    form: Form,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metric: torch.Tensor,
    thetas: tuple[float, float],
    counts: Counts,
    heard: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    begin: int = 0,
) -> torch.Tensor:
    """Causal attention of a whole text; rows of its last tile read everything.

    Args:
        form: The form.
        q: (heads, n, head_dim), scaled.
        k: (kv_heads, n, head_dim).
        v: (kv_heads, n, value_dim).
        metric: (kv_heads, head_dim), root mean square of the queries' channels.
        thetas: Logs of the thresholds: of what is proposed, and of what is opened.
        counts: Added to.
        heard: Told what tiles compare with the threshold, and the pairs behind each.

    Returns:
        (heads, n, value_dim).
    """
    heads, length, _ = q.shape
    kv_heads = k.shape[0]
    q = q.unflatten(0, (kv_heads, -1))
    keys, values, sink = ordered(form, k, v, metric)
    settled = (length - 1) // form.tile * form.tile
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    start = begin
    while start < length:
        closed = max(0, (start - WINDOW) // CHUNK)
        stop = min(
            length, start + CHUNK, (closed + 1) * CHUNK + WINDOW, length if start >= settled else settled
        )
        rows, first = stop - start, closed * CHUNK
        part = q[:, :, start:stop]
        near = part @ k[:, None, first:stop].mT
        near = near.masked_fill(
            ~near.new_ones(rows, stop - first).bool().tril(stop - first - rows), -torch.inf
        )
        counts.causal += heads * (stop * (stop + 1) - start * (start + 1)) // 2
        counts.near += heads * (_triangle(stop - first) - _triangle(start - first))
        logits, read = [near], [v[:, None, first:stop]]
        if closed:
            far = part @ keys[:, None, :first].mT
            seen = torch.ones_like(far[..., :: form.page], dtype=torch.bool)
            if start >= settled:
                counts.far += heads * rows * first
            else:
                seen = _seen(
                    form,
                    part,
                    far,
                    near,
                    (keys[:, :first], values[:, :first]),
                    thetas,
                    sink,
                    start,
                    counts,
                    heard,
                )
            if form.summary:
                runs = _run_weights(form, part, keys[:, :first], far)
                runs = runs.masked_fill(seen.repeat_interleave(form.page // form.summary, -1), -torch.inf)
                logits.append(runs)
                read.append(values[:, None, :first].unflatten(2, (-1, form.summary)).mean(3))
                counts.summary += heads * rows * runs.shape[-1]
            logits.append(far.masked_fill(~seen.repeat_interleave(form.page, -1), -torch.inf))
            read.append(values[:, None, :first])
        total = torch.stack([x.logsumexp(-1) for x in logits]).logsumexp(0)[..., None]
        out[:, :, start:stop] = sum((x - total).exp() @ y for x, y in zip(logits, read, strict=True))
        start = stop
    return out.flatten(0, 1)


def _run_weights(form: Form, q: torch.Tensor, keys: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    if form.weight == "exact":
        return far.unflatten(-1, (-1, form.summary)).logsumexp(-1)
    if form.weight == "balls":
        scores = runs_score(q, keys, form.ball, "logcosh")
        return scores.unflatten(-1, (-1, form.summary // form.ball)).logsumexp(-1)
    return runs_score(q, keys, form.summary, form.weight)


def _seen(
    form: Form, q: torch.Tensor, far: torch.Tensor, near: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor], thetas: tuple[float, float], sink: torch.Tensor,
    start: int, counts: Counts,
    heard: Callable[[torch.Tensor, torch.Tensor], None] | None,
) -> torch.Tensor:  # fmt: skip
    """Pages that rows see: (kv_heads, group or 1, rows, pages)."""
    (rows, lead), keys = (q.shape[2], start % form.tile), stored[0]
    tail = -(start + rows) % form.tile

    def by_tile(scores: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        shares = F.pad(scores - total, (0, 0, lead, tail), value=-torch.inf).unflatten(2, (-1, form.tile))
        return shares if form.own else shares.amax(1, keepdim=True)

    def so_far(shares: torch.Tensor) -> torch.Tensor:
        running = shares.cummax(3).values
        return running.scatter_(-1, sink.view(-1, 1, 1, 1, 1).expand(*running.shape[:-1], 1), ALWAYS)

    scores = page_score(form, q, keys, far, form.score)
    runs = runs_score(q, keys, form.totals, form.totals_term) if form.totals else scores
    total = torch.logaddexp(runs.logsumexp(-1), near.logsumexp(-1))[..., None]
    if form.opens != "share":
        scores = scores + missed(form, q, *stored)
    if form.falls:
        place = torch.arange(start, start + rows, device=q.device)
        scores = scores + form.falls * (place / 4096).log()[:, None]
    running = so_far(by_tile(scores, total))
    pairs = torch.full((running.shape[2],), form.tile, device=q.device)
    pairs[0] -= lead
    pairs[-1] -= tail
    pairs = (pairs * form.page * (1 if form.own else q.shape[1]))[:, None].expand_as(running[:, :, :, -1])
    if form.propose:
        counts.proposed = counts.proposed + (running[:, :, :, -1] > thetas[0]).mul(pairs).sum(
            dtype=torch.float64
        )
        if thetas[0] == -math.inf:  # the first threshold is looked for
            return _heard(running, pairs, thetas, counts, heard, lead, rows)
        exact = by_tile(page_score(form, q, keys, far, "exact"), total)
        running = so_far(exact.masked_fill(running <= thetas[0], -torch.inf))
    return _heard(running, pairs, thetas, counts, heard, lead, rows)


def _heard(
    running: torch.Tensor, pairs: torch.Tensor, thetas: tuple[float, float], counts: Counts,
    heard: Callable[[torch.Tensor, torch.Tensor], None] | None, lead: int, rows: int,
) -> torch.Tensor:  # fmt: skip
    whole = running[:, :, :, -1]
    if heard is not None:
        heard(whole, pairs)
    counts.far = counts.far + ((whole > thetas[1]) * pairs).sum(dtype=torch.float64)
    return (running > thetas[1]).flatten(2, 3)[:, :, lead : lead + rows]


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
