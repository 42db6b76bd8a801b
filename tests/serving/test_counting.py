"""What a server reads, counted for each of its engines."""

import time

import pytest
import torch
from tests.serving.batches import CONFIG, KV_HEADS
from tests.surgery.test_statistics import together

from llama_surgery.attention.result import AttentionResult
from llama_surgery.serving.counting import EngineCounters, LayerCounters, RowCount
from llama_surgery.surgery.rows import Part
from llama_surgery.topology.geometry import Block
from llama_surgery.topology.plan import plan_from_first_open


def engine(layers: int = 2) -> tuple[EngineCounters, list[LayerCounters]]:
    made, counters = EngineCounters(), [LayerCounters(CONFIG, KV_HEADS) for _ in range(layers)]
    for index, layer in enumerate(counters):
        made.register(index, layer)
    return made, counters


def part() -> AttentionResult:
    """Eight rows, each of a tile that reads two pages."""
    opened = torch.zeros(KV_HEADS, 1, 2, dtype=torch.int64)
    plan = plan_from_first_open(opened, Block(128, 136, 1), 8)
    return AttentionResult(torch.zeros(KV_HEADS, 1, 8, 16), torch.zeros(KV_HEADS, 1, 8), [plan])


def test_engines_of_one_process_speak_of_their_own_layers() -> None:
    (one, its), (other, others) = engine(), engine()
    its[0].add_parts([Part(128, 136, 8)], part())
    its[1].add_parts([Part(128, 136, 8)], part())
    others[0].add_rows(RowCount(3, 10, 20, 3))
    assert other.take(0.0).startswith("rows 3, far density 0.0000, total density")  # type: ignore[union-attr]
    told = one.take(0.0)
    assert told is not None and told.startswith("rows 16, far density 0.2415")
    assert f"pages read {2 * 2 * KV_HEADS}, dense fallbacks 0.0%" in told
    assert one.take(0.0) is None and other.take(0.0) is None


def test_layers_take_turns() -> None:
    made, layers = engine(3)
    for _ in range(4):
        made.next_turn()
        for layer in layers:
            layer.add_rows(RowCount(2, 1, 1, 0))
    assert [sum(c.rows for c in layer.by_tile.values()) for layer in layers] == [4, 2, 2]
    assert made.take(0.0).startswith("rows 8,")  # type: ignore[union-attr]


def test_each_engine_has_an_interval_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    (one, its), (other, others) = engine(), engine()
    for layers in (its, others):
        layers[0].add_rows(RowCount(1, 1, 1, 0))
    now = 109.0
    assert one.take(10.0) is None
    now = 110.0
    assert one.take(10.0) is not None
    its[0].add_rows(RowCount(1, 1, 1, 0))
    now = 111.0
    assert one.take(10.0) is None and other.take(10.0) is not None


def test_nothing_is_lost_between_two_reports() -> None:
    """Threads count while another reports."""
    made, (layer,) = engine(1)
    lines: list[str] = []

    def run(number: int) -> None:
        for _ in range(30):
            if number:
                layer.add_rows(RowCount(2, 1, 1, 1))
            else:
                lines.append(made.take(0.0) or "rows 0,")

    together(run)
    lines.append(made.take(0.0) or "rows 0,")
    assert sum(int(line.split()[1].rstrip(",")) for line in lines) == 7 * 30 * 2


def test_other_ranks_count_nothing() -> None:
    quiet = LayerCounters(CONFIG, KV_HEADS, quiet=True)
    quiet.add_parts([Part(128, 136, 8)], part())
    quiet.add_rows(RowCount(1, 1, 1, 1))
    assert quiet.tally(torch.device("cpu")) is None and quiet.reset() == ({}, 0)


def test_steps_that_a_graph_replays() -> None:
    """Every layer's pages lie in a tensor that stays; rows are the same for all of them."""
    made, layers = engine(2)
    tallies = [layer.steady_tally(torch.device("cpu")) for layer in layers]
    for _ in range(3):
        made.add_steps(RowCount.of([200, 40], CONFIG))
        for place, tally in enumerate(tallies):
            tally += torch.tensor([[1], [2 + place]])
    told = made.take(0.0)
    assert told is not None and told.startswith("rows 12,")
    assert f"pages read {3 * (2 + 3) * KV_HEADS}, dense fallbacks 50.0%" in told
    assert [
        layer.steady_tally(torch.device("cpu")) is tally for layer, tally in zip(layers, tallies, strict=True)
    ]
    assert not any(tally.any() for tally in tallies) and made.take(0.0) is None
