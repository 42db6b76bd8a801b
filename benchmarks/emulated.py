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

from llama_surgery.topology.selection import bounded_variance_term
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
            ``gaussian``, ``bounded``, ``logcosh``, ``mean``; ``centroids-K`` or ``centroids-K-bounded`` (K
            centres of its keys, and the bounded term of what is left); ``direction`` (mean and coordinates
            along the keys' principal direction).
        page, ball: Keys of a page and of the balls it is scored by.
        tile: Consecutive rows that share what they read.
        own: Heads of a group choose each for itself.
        summary: Keys of the runs that stand in for unread pages with their mean value; 0: nothing does.
        weight: What a run weighs: ``logcosh``, ``bounded``, ``exact`` or ``balls`` (its balls' log cosh).
        criterion: What is compared with the threshold: ``share``, ``error`` (share by the spread of logits
            and values within the page) or ``exact error`` of the page's summary.
        combine: A tile's rows and heads by their ``max`` or by the ``sum`` of squares.
        sensitivity: Weight of the log of the loss's gradient by a head's output.
        tree: Keys are sorted by: ``keys``, ``queries`` (keys in the metric of the queries), ``values`` (keys
            and values) or ``both``.
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
    criterion: str = "share"
    combine: str = "max"
    sensitivity: float = 0.0
    tree: str = "keys"
    density: float = 0.057


@dataclasses.dataclass
class Layer:
    """What is known of a layer beforehand.

    Attributes:
        metric: (kv_heads, head_dim), root mean square of the queries' channels.
        gradient: (kv_heads, group), log of the loss's gradient by a head's output.
    """

    metric: torch.Tensor
    gradient: torch.Tensor


@dataclasses.dataclass
class Counts:
    """(query, key) pairs over all heads; a summary's term counts as one."""

    causal: int = 0
    near: int = 0
    summary: int = 0
    far: torch.Tensor | float = 0.0


def log_cosh(variance: torch.Tensor) -> torch.Tensor:
    root = variance.clamp_min(1e-8).sqrt()
    return root + torch.log1p(torch.exp(-2 * root)) - math.log(2)


TERMS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "gaussian": lambda variance, _: 0.5 * variance,
    "bounded": lambda variance, size: bounded_variance_term(0.5 * variance, size),
    "logcosh": lambda variance, _: log_cosh(variance),
    "mean": lambda variance, _: torch.zeros_like(variance),
}


def runs_score(q: torch.Tensor, keys: torch.Tensor, size: int, term: str) -> torch.Tensor:
    """Log of what runs of ``size`` keys weigh: (kv_heads, group, rows, runs)."""
    variance, mean = torch.var_mean(keys.unflatten(1, (-1, size)), 2, correction=0)
    spread = q.square() @ variance[:, None].mT
    return q @ mean[:, None].mT + TERMS[term](spread, size) + math.log(size)


def page_score(
    form: Form, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, layer: Layer
) -> torch.Tensor:
    """Log of what pages are expected to weigh: (kv_heads, group, rows, pages)."""
    size = form.page
    if form.score == "exact":
        return logits.unflatten(-1, (-1, size)).logsumexp(-1)
    if form.score in TERMS:
        return runs_score(q, keys, form.ball, form.score).unflatten(-1, (-1, size // form.ball)).logsumexp(-1)
    pages = keys.unflatten(1, (-1, size))
    scaled = pages * layer.metric[:, None, None]
    if form.score == "direction":
        mean = pages.mean(2)
        centred = (pages - mean[:, :, None]) * layer.metric[:, None, None]
        direction = torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -1]
        along = torch.einsum("hpbd,hpd->hpb", centred, direction)
        reach = q @ (direction / layer.metric[:, None])[:, None].mT
        total = (reach[..., None] * along[:, None, None]).logsumexp(-1)
        return q @ mean[:, None].mT + total
    _, count, *bounded = form.score.split("-")
    members, centres = _clusters(scaled, int(count))
    sizes = members.sum(2)
    centres = torch.einsum("hpbk,hpbd->hpkd", members, pages) / sizes.clamp_min(1)[..., None]
    total = (torch.einsum("hgrd,hpkd->hgrpk", q, centres) + sizes.log()[:, None, None]).logsumexp(-1)
    if bounded:
        left = (pages - torch.einsum("hpbk,hpkd->hpbd", members, centres)).square().mean(2)
        total = total + TERMS["bounded"](q.square() @ left[:, None].mT, size)
    return total


def _clusters(pages: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means of every page from its farthest keys and its mean: members (…, keys, count) and centres."""

    def farthest(distance: torch.Tensor) -> torch.Tensor:
        index = distance.argmax(-1)[..., None, None].expand(*distance.shape[:2], 1, pages.shape[-1])
        return pages.gather(2, index).squeeze(2)

    mean = pages.mean(2)
    chosen = [farthest((pages - mean[:, :, None]).square().sum(-1)), mean]
    while len(chosen) < count:
        near = torch.stack([(pages - one[:, :, None]).square().sum(-1) for one in chosen]).amin(0)
        chosen.append(farthest(near))
    centres = torch.stack(chosen, 2)
    for _ in range(6):
        nearest = (pages[:, :, :, None] - centres[:, :, None]).square().sum(-1).argmin(-1)
        members = F.one_hot(nearest, count).to(pages.dtype)
        sizes = members.sum(2)[..., None]
        means = torch.einsum("hpbk,hpbd->hpkd", members, pages) / sizes.clamp_min(1)
        centres = torch.where(sizes > 0, means, centres)
    return members, centres


def ordered(form: Form, k: torch.Tensor, v: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, ...]:
    """Keys and values of full chunks in tree order, and the page of position 0."""
    keys, values = (x[:, : x.shape[1] // CHUNK * CHUNK].unflatten(1, (-1, CHUNK)) for x in (k, v))
    sorted_by = keys * layer.metric[:, None, None] if form.tree in ("queries", "both") else keys
    if form.tree in ("values", "both"):
        spreads = [
            (x - x.mean(2, keepdim=True)).square().sum(-1).mean((1, 2)).sqrt() for x in (sorted_by, values)
        ]
        sorted_by = torch.cat((sorted_by, values * (0.7 * spreads[0] / spreads[1])[:, None, None, None]), -1)
    order = tree_order(sorted_by, min(form.ball, form.summary or form.ball), 2)
    index = order.unsqueeze(-1)
    keys, values = (x.gather(2, index.expand(x.shape)).flatten(1, 2) for x in (keys, values))
    return keys, values, (order[:, 0] == 0).int().argmax(-1) // form.page


def attend(
    form: Form,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Layer,
    theta: float,
    counts: Counts,
    heard: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Causal attention of a whole text; rows of its last tile read everything.

    Args:
        form: The form.
        q: (heads, n, head_dim), scaled.
        k: (kv_heads, n, head_dim).
        v: (kv_heads, n, value_dim).
        layer: Of the layer.
        theta: Log of the threshold.
        counts: Added to.
        heard: Told what tiles compare with the threshold, and the pairs behind each.

    Returns:
        (heads, n, value_dim).
    """
    heads, length, _ = q.shape
    kv_heads = k.shape[0]
    q = q.unflatten(0, (kv_heads, -1))
    keys, values, sink = ordered(form, k, v, layer)
    settled = (length - 1) // form.tile * form.tile
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    start = 0
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
                seen = _seen(form, part, far, near, keys[:, :first], values[:, :first], layer, theta,
                             sink, start, counts, heard)  # fmt: skip
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
    form: Form, q: torch.Tensor, far: torch.Tensor, near: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, layer: Layer, theta: float, sink: torch.Tensor, start: int, counts: Counts,
    heard: Callable[[torch.Tensor, torch.Tensor], None] | None,
) -> torch.Tensor:  # fmt: skip
    """Pages that rows see: (kv_heads, group or 1, rows, pages)."""
    near_total = near.logsumexp(-1)
    if form.criterion == "exact error":
        total = torch.logaddexp(far.logsumexp(-1), near_total)[..., None]
        weights = (far - total).exp().unflatten(-1, (-1, form.page))
        spread = values.unflatten(1, (-1, form.page))
        spread = spread - spread.mean(2, keepdim=True)
        compared = (
            torch.einsum("hgrpk,hpkd->hgrpd", weights, spread).square().sum(-1).clamp_min(1e-30).log() / 2
        )
    else:
        scores = page_score(form, q, keys, far, layer)
        compared = scores - torch.logaddexp(scores.logsumexp(-1), near_total)[..., None]
    if form.criterion == "error":
        variance = keys.unflatten(1, (-1, form.page)).var(2, correction=0)
        within = torch.log1p(-torch.exp(-(q.square() @ variance[:, None].mT))).clamp_min(-20)
        spread = values.unflatten(1, (-1, form.page)).var(2, correction=0).sum(-1).log()
        compared = compared + 0.5 * (within + spread[:, None, None])
    if form.sensitivity:
        compared = compared + form.sensitivity * layer.gradient[..., None, None]
    rows, lead = compared.shape[2], start % form.tile
    tail = -(start + rows) % form.tile
    tiles = F.pad(compared, (0, 0, lead, tail), value=-torch.inf).unflatten(2, (-1, form.tile))
    if form.combine == "sum":
        tiles = 2 * tiles
    if not form.own:
        tiles = tiles.amax(1, keepdim=True) if form.combine == "max" else tiles.logsumexp(1, keepdim=True)
    running = tiles.cummax(3).values if form.combine == "max" else tiles.logcumsumexp(3)
    running.scatter_(-1, sink.view(-1, 1, 1, 1, 1).expand(*running.shape[:-1], 1), ALWAYS)
    whole = running[:, :, :, -1]
    pairs = torch.full((whole.shape[2],), form.tile, device=q.device)
    pairs[0] -= lead
    pairs[-1] -= tail
    pairs = (pairs * form.page * (1 if form.own else q.shape[1]))[:, None].expand(whole.shape)
    if heard is not None:
        heard(whole, pairs)
    counts.far = counts.far + ((whole > theta) * pairs).sum(dtype=torch.float64)
    return (running > theta).flatten(2, 3)[:, :, lead : lead + rows]


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
