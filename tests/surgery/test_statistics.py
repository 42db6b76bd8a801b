"""What is counted, against the pairs found in the masks of what was executed."""

import copy
import dataclasses
import functools
import json
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.surgery.tiny import (
    DENSE_LIMIT,
    SINGLE,
    SPARSE,
    build,
    in_pieces,
    llama,
    logits,
    pad,
    positions,
    tokens,
)

from llama_surgery import Statistics, SurgeryConfig, eject, operate, operated, reset_statistics, statistics
from llama_surgery.attention.result import AttentionResult
from llama_surgery.surgery import execute
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.statistics import Counters
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.plan import page_mask, plan_from_first_open

LAYERS, KV_HEADS = 2, 2


@dataclasses.dataclass
class Count:
    """Pairs by layer and KV head, counted one by one in boolean matrices; far ones are means over heads."""

    near: torch.Tensor
    visible: torch.Tensor
    executed: torch.Tensor
    pages: torch.Tensor
    causal: int = 0


@pytest.fixture(scope="module")
def counted():
    """Counts what attend() executes, from its plans as masks, beside the package's own counters."""
    count = Count(*(torch.zeros(LAYERS, KV_HEADS, dtype=torch.float64) for _ in range(4)))
    calls = []

    def listened(call, *states):
        return functools.partial(listen, call, original(call, *states))

    def listen(call, executor, queries, *states, start, sink_logit):
        result = executor(queries, *states, start=start, sink_logit=sink_logit)
        layer = len(calls) % LAYERS
        config, rows = call.config, queries.shape[2]
        near_from = torch.zeros(rows, dtype=torch.int64)
        for plan in result.plans:
            inside = slice(plan.block.start - start, plan.block.stop - start)
            near_from[inside] = plan.block.closed * config.chunk_size
            pages = plan.block.closed * config.pages_per_chunk
            assert len(plan.counts) == len(queries) * (1 if plan.tile == 1 else queries.shape[1])
            mask = page_mask(plan, pages).unflatten(0, (len(queries), -1))
            mask = mask.transpose(0, 1).unflatten(1, (-1, KV_HEADS))  # (choosers, …, KV heads, rows, pages)
            tile = torch.arange(plan.block.start, plan.block.stop) // plan.tile
            count.visible[layer] += mask.sum((0, 1, 3, 4)) * config.page_size / len(mask)
            for t in tile.unique():
                read = mask[..., tile == t, :].any(-2)  # a tile reads what any of its rows sees
                rows_read = (tile == t).sum() * config.page_size / len(mask)
                count.executed[layer] += read.sum((0, 1, 3)) * rows_read
                count.pages[layer] += read.sum((0, 1, 3))
        sequences = len(queries) // KV_HEADS
        row = torch.arange(start, start + rows)
        count.near[layer] += int((row + 1 - near_from).sum()) * sequences
        count.causal += int((row + 1).sum()) * sequences
        calls.append(layer)
        return result

    with pytest.MonkeyPatch.context() as patch:
        original = execute.executor_of
        patch.setattr(execute, "executor_of", listened)
        yield count, calls


def check(read: Statistics, count: Count):
    pairs = count.causal * KV_HEADS
    assert read.causal_pairs == pairs
    assert read.near_density == pytest.approx(int(count.near.sum()) / pairs)
    assert read.far_density == pytest.approx(float(count.executed.sum()) / pairs)
    assert read.visible_far_density == pytest.approx(float(count.visible.sum()) / pairs)
    total = read.near_density + read.far_density + read.summary_density
    assert read.total_density == pytest.approx(total)
    assert read.pages_read == int(count.pages.sum())
    causal = count.causal / LAYERS
    for layer, part in read.by_layer.items():
        assert part["far_density"] == pytest.approx((count.executed[layer] / causal).tolist(), rel=1e-6)
        assert part["pages_read"] == count.pages[layer].tolist()
        assert part["near_density"] == pytest.approx(int(count.near[layer, 0]) / causal)


@settings(max_examples=15)
@given(st.data())
def test_densities_are_those_counted_in_the_masks(counted, data):
    """One sequence, a batch or a padded batch, in one piece or several, tiles and decode steps."""
    count, calls = counted
    for total in (count.near, count.visible, count.executed, count.pages):
        total.zero_()
    count.causal = 0
    calls.clear()
    config = data.draw(st.sampled_from([SPARSE, SINGLE, DENSE_LIMIT]))
    config = dataclasses.replace(config, dense_until=data.draw(st.sampled_from([0, 128])))
    width = data.draw(st.integers(1, 260))
    cuts = data.draw(st.lists(st.integers(1, width), max_size=3))
    if data.draw(st.booleans()):
        ids, mask = tokens(data.draw(st.integers(1, 2)), width), None
    else:
        ids, mask = pad([tokens(width)], [0], width)
    with operated(llama(), config, routers={}) as model:
        in_pieces(model, ids, [cut for cut in cuts if cut < width], mask=mask)
        read = statistics(model)
    check(read, count)
    if config.theta == 0:
        assert read.total_density == pytest.approx(1)
        assert read.visible_far_density == read.far_density


def test_padding_is_not_counted():
    ids, mask = pad([tokens(200), tokens(120, seed=1)], [0, 80], 200)
    with operated(llama(), SPARSE) as model:
        logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        together = statistics(model)
        reset_statistics(model)
        for row in (tokens(200), tokens(120, seed=1)):
            logits(model, row)
        alone = statistics(model)
    assert together == alone
    assert together.rows == (200 + 120) * LAYERS


def test_tiles_and_decode_steps_are_told_apart():
    with operated(llama(), SPARSE) as model:
        model.generate(tokens(1, 200), max_new_tokens=11, do_sample=False)
        read = statistics(model)
        assert read.by_tile.keys() == {"1", "8"}
        assert read.by_tile["8"]["rows"] == 200 * LAYERS
        assert read.by_tile["1"]["rows"] == 10 * LAYERS
        assert read.rows == 210 * LAYERS
        for part in read.by_tile.values():
            assert 0 < part["far_density"] < part["total_density"] < 1
            assert part["pages_per_tile_row"] > 1  # the sink page and more


def test_reset_and_eject():
    model = operate(llama(), SPARSE)
    logits(model, tokens(200))
    first = statistics(model)
    assert first.pages_read > 0
    reset_statistics(model)
    empty = statistics(model)
    assert (empty.pages_read, empty.rows, empty.causal_pairs, empty.total_density) == (0, 0, 0, 0)
    assert empty.by_tile == {}
    logits(model, tokens(200))
    assert statistics(model) == first
    reset_statistics(model)
    eject(model)
    with operated(model, SPARSE):
        assert statistics(model).rows == 0


def test_statistics_become_plain_json():
    with operated(llama(), SPARSE) as model:
        assert json.loads(json.dumps(statistics(model).to_dict()))["rows"] == 0
        logits(model, tokens(200))
        read = statistics(model)
        told = json.loads(json.dumps(read.to_dict()))
    assert told["far_density"] == read.far_density
    assert told["by_layer"]["0"]["pages_read"] == read.by_layer[0]["pages_read"]


@pytest.fixture
def restless():
    """Threads take turns after every few instructions, so that what is not exclusive shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(run, threads=8):
    """Call ``run(number)`` in threads that begin at once."""
    barrier = threading.Barrier(threads)

    def thread(number):
        barrier.wait()
        return run(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(thread, range(threads)))


class YieldingInt(int):
    """A number that lets other threads go first whenever it is added to: as large a race as there can be."""

    def __add__(self, other):
        time.sleep(1e-5)
        return YieldingInt(int(self) + int(other))


@pytest.mark.usefixtures("restless")
def test_counts_of_threads_add_up():
    counters, times = Counters(), 20
    counters.rows = counters.near_pairs = counters.causal_pairs = YieldingInt(0)
    config, block = SurgeryConfig(chunk_size=32, page_size=16, window=32, tile=8), Block(64, 72, 1)
    plan = plan_from_first_open(torch.zeros(4, 1, 3, dtype=torch.int64), block, 8)
    result = AttentionResult(torch.zeros(4, 1, 8, 16), torch.zeros(4, 1, 8), [plan])

    def run(_):
        for _ in range(times):
            counters.add(result, 2, config, Part(64, 72, 8))
            counters.count(1, 2, 3)
            counters.tally(2, 16, torch.device("cpu"))

    together(run)
    calls = 8 * times
    near, causal = (2 * sum(range(first, first + 8)) for first in (33, 65))  # of two sequences
    counted = (counters.rows, counters.near_pairs, counters.causal_pairs)
    assert counted == (17 * calls, (near + 2) * calls, (causal + 3) * calls)
    assert counters.totals("pages") == [6 * calls] * 2
    assert counters.totals("far_pairs") == counters.totals("visible_pairs") == [6 * 8 * 16 * calls] * 2


@pytest.mark.usefixtures("restless")
def test_a_model_called_by_threads_counts_as_one_that_is_called_in_turn():
    model, ids = llama(), tokens(1, 150)
    with operated(model, SPARSE):
        for _ in range(8):
            logits(model, ids)
        expected = statistics(model)
        reset_statistics(model)
        together(lambda _: logits(model, ids))
        assert statistics(model) == expected


def test_there_is_one_tally_for_all_threads():
    counters = Counters()
    tallies = together(lambda _: counters.tally(2, 16, torch.device("cpu")))
    assert len({id(tally) for tally in tallies}) == 1


def test_tallies_of_other_pages_are_kept():
    """After a change of configuration pages are of another size: what was counted keeps its own."""
    counters = Counters()
    counters.tally(2, 16, torch.device("cpu")).add_(torch.tensor([[1, 2], [3, 4]]))
    counters.tally(2, 32, torch.device("cpu")).add_(torch.tensor([[10, 20], [30, 40]]))
    assert counters.totals("visible_pairs") == [16 + 320, 32 + 640]
    assert counters.totals("far_pairs") == [3 * 16 + 30 * 32, 4 * 16 + 40 * 32]
    assert counters.totals("pages") == [33, 44]


def test_counters_are_copied_and_pickled_with_their_model():
    with operated(build("Llama"), SPARSE) as model:
        logits(model, tokens(1, 150))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert statistics(twin) == statistics(model)
