"""Every rule against an example small enough to work out by hand."""

import itertools
import math

import pytest
import torch

from llama_surgery.evaluation.peers.maps import (
    Antidiagonals,
    CumulativeShare,
    HeaviestBlocks,
    PooledGate,
    VerticalSlash,
    block_attention,
    jensen_shannon,
    line_sums,
)
from llama_surgery.evaluation.peers.rows import (
    BoundedPages,
    HeaviestTokens,
    MeanBlocks,
    RetrievalHeads,
    SinkWindow,
)
from llama_surgery.evaluation.peers.rule import Call, Rule, causal, cumulative


def call_of(queries, keys, layer: int = 0) -> Call:
    """One sequence and one head: lists of numbers (one channel) or of vectors."""
    q, k = (torch.tensor(x, dtype=torch.float32) for x in (queries, keys))
    q, k = (x[:, None] if x.dim() == 1 else x for x in (q, k))
    return Call(q[None, None], k[None, None], 1.0, layer)


def seen(rule: Rule, call: Call, head: int = 0) -> dict[int, list[int]]:
    """Keys that each row sees."""
    visible = rule.visible(call, rule.prepare(call), call.start, call.stop)
    visible = visible & causal(call.start, call.stop, visible.device)
    visible = visible.expand(1, call.queries.shape[1], -1, -1)[0, head]
    return {call.start + i: row.nonzero()[:, 0].tolist() for i, row in enumerate(visible)}


def spikes(n: int, rows: dict[int, list[int]]) -> tuple[list[list[float]], list[list[float]]]:
    """Queries and keys such that a row's attention is shared equally among the keys it is given."""
    keys = (torch.eye(n) * 100).tolist()
    queries = [[1.0 if key in rows.get(row, [row]) else 0.0 for key in range(n)] for row in range(n)]
    return queries, keys


def test_sink_and_window() -> None:
    rule = SinkWindow(window=2, sinks=1)
    rows = seen(rule, call_of([0] * 5, [0] * 5))
    assert rows == {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 2, 3], 4: [0, 3, 4]}


def test_retrieval_heads_see_everything() -> None:
    x = torch.zeros(1, 4, 5, 2)
    rule = RetrievalHeads(torch.tensor([[False, False], [False, True]]), window=1, sinks=1)
    # Four query heads share two KV heads, two each.
    assert seen(rule, Call(x, x, 1.0, layer=1), head=2)[4] == [0, 1, 2, 3, 4]
    assert seen(rule, Call(x, x, 1.0, layer=1), head=1)[4] == [0, 4]
    assert seen(rule, Call(x, x, 1.0, layer=0), head=2)[4] == [0, 4]


def test_mean_blocks() -> None:
    # Means of the blocks of two: 2, 0, 1, and the own block of rows 6 and 7.
    rule = MeanBlocks(count=2, keys_per_block=2)
    rows = seen(rule, call_of([1, 1, 1, 1, 1, 1, 1, -1], [1, 3, 5, -5, 0, 2, 9, 9]))
    assert rows[6] == [0, 1, 6]
    assert rows[7] == [2, 3, 6, 7]
    assert rows[3] == [0, 1, 2, 3]
    assert seen(MeanBlocks(1, 2), call_of([1] * 4, [1] * 4))[3] == [2, 3]


def test_page_bounds_see_what_means_do_not() -> None:
    # Page 0 holds 4 and −4: its mean is 0, its bound for q = 1 is 4; page 1 holds 1 and 1.
    keys = [4, -4, 1, 1, 0, 0]
    assert seen(BoundedPages(2, 2), call_of([1] * 6, keys))[5] == [0, 1, 4, 5]
    assert seen(MeanBlocks(2, 2), call_of([1] * 6, keys))[5] == [2, 3, 4, 5]
    # The bound takes the better end of each channel: −1·(−4) + 1·3 against −1·(−2) + 1·4.
    keys = [[-4, 0], [0, 3], [-2, 4], [-2, 4], [0, 0], [0, 0]]
    assert seen(BoundedPages(2, 2), call_of([[-1, 1]] * 6, keys))[5] == [0, 1, 4, 5]


def test_token_oracle() -> None:
    rows = seen(HeaviestTokens(2), call_of([1, 1, 1, -1], [3, 1, 2, 0]))
    assert rows == {0: [0], 1: [0, 1], 2: [0, 2], 3: [1, 3]}


@pytest.mark.parametrize("kind", ["distinct", "ties", "float16"])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 5), (12, 5), (22, 23), (22, 24), (22, 1)])
def test_token_oracle_against_sorting(kind: str, start: int, count: int) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 3, 23 - start, 4), torch.randn(2, 3, 23, 4)
    if kind == "ties":
        queries, keys = queries.round(), keys.round()
    if kind == "float16":
        queries, keys = queries.half(), keys.half()
    call = Call(queries, keys, 0.5, 0)
    # A strip in the middle of the call, as the executor cuts them, sees the keys before its own end only.
    first, last = (start, 23) if start > 12 else (start + 3, 20)
    visible = HeaviestTokens(count).visible(call, None, first, last) & causal(first, last, keys.device)
    for batch, head, row in itertools.product(range(2), range(3), range(first, last)):
        own = (queries[batch, head, row - start] @ keys[batch, head, : row + 1].mT).float() * 0.5
        least = own.sort(descending=True).values[min(count, row + 1) - 1]
        chosen = visible[batch, head, row - first, : row + 1]
        # Keys as heavy as the last one that is chosen are chosen too; a row with fewer keys sees all.
        assert chosen.tolist() == (own >= least).tolist()
        assert chosen.sum() == min(count, row + 1) or kind != "distinct"


def test_antidiagonals() -> None:
    # A row block's first row meets the second key of every square: here it alone counts.
    keys = [9, 0, 9, 4, 9, 2, 9, 0]
    call = call_of([1, 0] * 4, keys)
    logits = Antidiagonals(0.5, block=2, stride=2).squares(call)[0, 0, 3]
    assert logits.tolist() == [0, 2, 1, 0]
    # softmax: 1, 7.39, 2.72, 1 of 12.1. First and own block have 17%, with square 1 it is 78%.
    assert seen(Antidiagonals(0.1, 2, 2), call)[7] == [0, 1, 6, 7]
    assert seen(Antidiagonals(0.5, 2, 2), call)[7] == [0, 1, 2, 3, 6, 7]
    assert seen(Antidiagonals(0.8, 2, 2), call)[7] == list(range(8))


def test_antidiagonals_of_a_decode_step() -> None:
    # Position 6 is even, as a block's first row: the same logits, not halved for a row that is not there.
    call = call_of([1], [9, 0, 9, 4, 9, 2, 9])
    assert Antidiagonals(0.5, 2, 2).squares(call)[0, 0, 0].tolist() == [0, 4, 2, 0]
    assert seen(Antidiagonals(0.5, 2, 2), call) == {6: [0, 1, 2, 3, 6]}


def test_vertical_slash() -> None:
    # The last two rows share column 2 and the diagonal three back.
    queries, keys = spikes(8, {6: [2, 3], 7: [2, 4]})
    rule = VerticalSlash(count=1, last_rows=2, sinks=1, near=1)
    rows = seen(rule, call_of(queries, keys))
    assert rows[7] == [0, 2, 4, 7]
    assert rows[6] == [0, 2, 3, 6]
    assert rows[4] == [0, 1, 2, 4]
    assert rows[1] == [0, 1]


def test_sums_along_lines() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])[None, None]
    columns, diagonals = line_sums(weights, 4)
    assert columns[0, 0].tolist() == pytest.approx([0.6, 0.45, 0.55, 0.4])
    # Row 2 and row 3: zero back 0.25 + 0.4, one back 0.25 + 0.3, two back 0.5 + 0.2, three back 0.1.
    assert diagonals[0, 0].tolist() == pytest.approx([0.65, 0.55, 0.7, 0.1])


def test_cumulative_share_by_lines() -> None:
    # Block of two rows: row 6 reads keys 2 and 3, row 7 key 2 alone, so that column 2 has 3/4 of all.
    queries, keys = spikes(8, {6: [2, 3], 7: [2]})
    rule = CumulativeShare(0.7, block=2, distance=-1.0)
    rows = seen(rule, call_of(queries, keys))
    # Diagonals: five back has 1/2, three and four back 1/4 each; 0.7 takes five back and one of both.
    assert set(rows[7]) >= {0, 1, 2, 6, 7} and len(rows[7]) == 6
    assert 2 in rows[5] and rows[3] == [0, 1, 2, 3]


def test_cumulative_share_by_blocks() -> None:
    # Mean queries are 1 and mean keys 2, 0, 3, 0: row blocks 0 … 3 give them softmaxes of
    # (1), (0.88, 0.12), (0.26, 0.04, 0.71) and (0.25, 0.03, 0.68, 0.03): 4 in all.
    call = call_of([1] * 8, [2, 2, 0, 0, 3, 3, 0, 0])
    predicted = CumulativeShare(0.5, block=2).predicted(call)[0, 0, 3]
    assert predicted.tolist() == pytest.approx([0.251, 0.034, 0.682, 0.034], abs=1e-3)
    # 0.5 of 4 takes 1.0, 0.88 and 0.71; the first block and own blocks come in any case.
    assert seen(CumulativeShare(0.5, 2, distance=9.0), call)[7] == [0, 1, 6, 7]
    # 0.8 of 4 takes 0.68 too.
    assert seen(CumulativeShare(0.8, 2, distance=9.0), call)[7] == [0, 1, 4, 5, 6, 7]


def test_jensen_shannon_distance() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert jensen_shannon(p, q).item() == pytest.approx(math.sqrt(math.log(2)))
    assert jensen_shannon(p, p).item() == 0


def test_pooled_gate_uses_its_maps() -> None:
    # Keys of blocks: (0, 4), (3, 3), (1, 1), own. Mean prefers block 1, the maximum block 0.
    call = call_of([1] * 8, [0, 4, 3, 3, 1, 1, 0, 0])
    query_map = torch.ones(1, 1, 1, 1)
    by_mean, by_largest = (torch.zeros(1, 1, 3, 1) for _ in range(2))
    by_mean[0, 0, 0], by_largest[0, 0, 1] = 1, 1
    assert seen(PooledGate(2, query_map, by_mean, block=2), call)[6] == [2, 3, 6]
    assert seen(PooledGate(2, query_map, by_largest, block=2), call)[7] == [0, 1, 6, 7]


def test_block_oracle_adds_up_true_attention() -> None:
    # Row 6 reads key 0; row 7 keys 2 and 3, both of one block: equal sums; a third row would decide.
    queries, keys = spikes(8, {6: [0, 2], 7: [2, 3]})
    rows = seen(HeaviestBlocks(2, block=2), call_of(queries, keys))
    assert rows[6] == [2, 3, 6] and rows[7] == [2, 3, 6, 7]


@pytest.mark.parametrize("rows", [11, 1])
@pytest.mark.parametrize("how", ["sum", "max"])
def test_attention_of_blocks(rows: int, how: str) -> None:
    torch.manual_seed(0)
    call = Call(torch.randn(1, 1, rows, 4), torch.randn(1, 1, 11, 4), 0.5, 0)
    weights = call.weights(call.start, 11)[0, 0]
    found = block_attention(call, 4, how)[0, 0]
    first = call.start // 4
    for i in range(found.shape[0]):
        low, high = max((first + i) * 4, call.start), min((first + i + 1) * 4, 11)
        for j in range(3):
            tile = weights[low - call.start : high - call.start, j * 4 : j * 4 + 4]
            expected = tile.sum() if how == "sum" else tile.max()
            assert found[i, j].item() == pytest.approx(expected.item(), abs=1e-6)


def test_fewest_that_reach_a_share() -> None:
    weights = torch.tensor([0.1, 0.5, 0.05, 0.35])
    assert cumulative(weights, 0.4).tolist() == [False, True, False, False]
    assert cumulative(weights, 0.6).tolist() == [False, True, False, True]
    assert cumulative(weights, 0.0).tolist() == [False] * 4
    assert cumulative(weights, 1.0).tolist() == [True] * 4
    forced = torch.tensor([False, False, True, False])
    assert cumulative(weights, 0.5, forced).tolist() == [False, True, True, False]
