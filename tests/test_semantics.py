"""docs/semantics.md as a slow loop over rows and keys, against every backend and arrival."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.attention.api import attend
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import near_pairs

CHUNK, PAGE, DIM = 16, 4, 8
SCALE = DIM**-0.5


def slow_pages(keys: torch.Tensor, size: int) -> list[list[int]]:
    """Pages of one full chunk, as lists of offsets: recursive median splits along the first direction."""

    def split(offsets: list[int]) -> list[list[int]]:
        if len(offsets) == size:
            return [sorted(offsets)]
        rows = keys[offsets] - keys[offsets].mean(0)
        covariance = rows.T @ rows
        direction = covariance[:, covariance.diagonal().argmax()].clone()
        for _ in range(8):
            direction = covariance @ (direction / direction.norm())
        projection = (rows @ (direction / direction.norm())).tolist()
        ranked = sorted(range(len(offsets)), key=lambda i: (projection[i], offsets[i]))
        half = len(offsets) // 2
        return split(sorted(offsets[i] for i in ranked[:half])) + split(
            sorted(offsets[i] for i in ranked[half:])
        )

    return split(list(range(len(keys))))


def stands_in(variance: torch.Tensor) -> torch.Tensor:
    """What a variance of logits adds to a page's weight: √(1 + v) − 1."""
    return (1 + variance).sqrt() - 1


def slow_attention(q, k, v, config, calls):
    """Output and pairs of one stream: q (heads, n, dim), k and v (n, dim), calls [(start, stop)].

    Near pairs are those of one head, far pairs those of all sets of pages, of which every head has one,
    or all heads together.
    """
    heads, n, _ = q.shape
    pages = []  # chunk by chunk
    for c in range(n // CHUNK):
        by_offset = slow_pages(k[c * CHUNK : (c + 1) * CHUNK], PAGE)
        pages.append([[c * CHUNK + offset for offset in page] for page in by_offset])
    moments = {  # of every page, by its first key
        page[0]: (k[page].mean(0), k[page].var(0, correction=0)) for chunk in pages for page in chunk
    }
    out = torch.empty(heads, n, DIM, dtype=q.dtype)
    near_pairs = far_pairs = 0
    for start, stop in calls:
        tile = 1 if start > 0 and stop - start == 1 else config.tile
        theta = config.theta if tile == config.tile else config.theta_decode
        opened: list[set[int]] = []  # by head
        for p in range(start, stop):
            q0 = p // tile * tile
            if p in (q0, start):
                opened = [set() for _ in range(heads)]
            closed = 0 if q0 < config.dense_until else max(0, (q0 - config.window) // CHUNK)
            far = [page for chunk in pages[:closed] for page in chunk]
            near = list(range(closed * CHUNK, p + 1))
            weights: list[list[torch.Tensor]] = []  # by head, what pages weigh unread
            for h in range(heads):
                scores = []
                weights.append([])
                for page in far:
                    mean, var = moments[page[0]]
                    linear = math.log(PAGE) + SCALE * (q[h, p] @ mean)
                    spread = SCALE**2 * (q[h, p] ** 2 @ var)
                    most = math.log(PAGE)
                    root = (1 + spread) ** 0.5 - (1 + 2 * most) ** 0.5
                    term = spread / 2 if spread / 2 < most else most + (2 * most) ** 0.5 * root
                    scores.append(linear + term)
                    weights[h].append(linear + stands_in(spread))
                total = torch.cat((torch.tensor(weights[h]).to(q), SCALE * (k[near] @ q[h, p]))).logsumexp(0)
                for b, score in enumerate(scores):
                    if (score - total).exp() > theta:
                        opened[h].add(b)
            if tile == 1:
                opened = [set.union(*opened)] * heads
            near_pairs += len(near)
            for h in range(heads):
                seen = [b for b, page in enumerate(far) if b in opened[h] or 0 in page]
                shown = [j for b in seen for j in far[b]]
                far_pairs += len(shown) if tile > 1 or h == 0 else 0
                visible = near + shown
                logits, values = [SCALE * (k[visible] @ q[h, p])], [v[visible]]
                for b in set(range(len(far))) - set(seen) if config.summary != "none" else ():
                    logits.append(weights[h][b][None])
                    values.append(v[far[b]].mean(0)[None])
                out[h, p] = torch.softmax(torch.cat(logits), 0) @ torch.cat(values)
    return out, near_pairs, far_pairs


@st.composite
def cases(draw):
    tile = draw(st.sampled_from([1, 4, 8]))
    n = draw(st.integers(1, 90))
    cuts = draw(st.lists(st.integers(1, n), max_size=4))
    theta = draw(st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.3]))
    decode = theta if tile == 1 else draw(st.sampled_from([0.0, 0.01, 0.05]))
    config = SurgeryConfig(
        chunk_size=CHUNK,
        page_size=PAGE,
        window=draw(st.sampled_from([0, 8, 16])),
        tile=tile,
        theta=theta,
        theta_decode=decode,
        summary=draw(st.sampled_from(["page", "none"])),
        dense_until=draw(st.sampled_from([0, 0, 40])),
        backend=draw(st.sampled_from(["reference", "gather"])),
    )
    edges = sorted({0, n, *cuts})
    heads = draw(st.sampled_from([1, 2, 3, 7]))
    return config, heads, list(itertools.pairwise(edges)), draw(st.integers(0, 2**31))


@given(cases())
def test_backends_follow_the_slow_loop(case):
    config, heads, calls, seed = case
    n = calls[-1][1]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = 2 * draw(heads, n, DIM), draw(n, DIM) * (1 + 3 * draw(DIM).abs()), draw(n, DIM)
    expected, *pairs = slow_attention(q, k, v, config, calls)

    store, outs, near_read, far_read = SequenceStore(config), [], 0, 0
    for start, stop in calls:
        tile = 1 if start > 0 and stop - start == 1 else config.tile
        near = store.append(k[None, None, start:stop], v[None, None, start:stop], since=0)
        result = attend(q[None, :, start:stop], *near, store.layout, config=config, start=start, tile=tile)
        outs.append(result.out[0])
        far_read += sum(int(plan.visible_pairs(PAGE).sum()) for plan in result.plans)
        near_read += near_pairs(start, stop, config, tile)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-9)
    assert [near_read, far_read] == pairs


@given(cases(), st.data())
def test_later_tokens_change_nothing_before_them(case, data):
    config, heads, calls, seed = case
    n = calls[-1][1]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = 2 * draw(heads, n, DIM), 2 * draw(n, DIM), draw(n, DIM)
    changed = data.draw(st.integers(0, n - 1))

    def run(q, k, v):
        store = SequenceStore(config)
        near = store.append(k[None, None], v[None, None], since=0)
        return attend(q[None], *near, store.layout, config=config, start=0).out[0]

    before = run(q, k, v)[:, :changed]
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    for x in (q2[:, changed:], k2[changed:], v2[changed:]):
        x.mul_(-3).add_(1)
    torch.testing.assert_close(run(q2, k2, v2)[:, :changed], before, rtol=1e-12, atol=1e-12)
    if changed:
        left = run(q[:, :changed], k[:changed], v[:changed])
        torch.testing.assert_close(left, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [[90], [32, 58], [7, 9, 16, 58], [1] * 90])
def test_a_chunk_has_one_layout_however_it_arrives(pieces):
    config = SurgeryConfig(chunk_size=CHUNK, page_size=PAGE, window=8, tile=8)
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(2, 2, 90, DIM, generator=generator, dtype=torch.float64)
    whole, store, start = SequenceStore(config), SequenceStore(config), 0
    whole.append(k, k, since=0)
    for piece in pieces:
        store.append(k[:, :, start : start + piece], k[:, :, start : start + piece], since=0)
        start += piece
    assert torch.equal(whole.layout.order, store.layout.order)
    assert torch.equal(whole.layout.keys, store.layout.keys)
    assert torch.equal(whole.layout.moments.mean, store.layout.moments.mean)
