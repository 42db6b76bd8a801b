"""What decode steps in CUDA graphs read: tensors that stay, and chunks that are sorted before."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.batches import CONFIG, KV_HEADS

from llama_surgery.serving.counting import EngineCounters, LayerCounters
from llama_surgery.serving.vllm.steps import Steps

pytestmark = pytest.mark.serve

SIZE = CONFIG.chunk_size
#: The shortest sequence whose last row has a closed chunk.
FIRST = SIZE + CONFIG.window + 1


def test_tensors_stay_and_say_what_the_engine_says() -> None:
    steps, engine = Steps(CONFIG, 4, torch.device("cpu")), EngineCounters()
    engine.register(0, LayerCounters(CONFIG, KV_HEADS))
    tables = torch.arange(32, dtype=torch.int32).view(4, 8)
    seen = []
    for lengths, dense in (([300, 65, 0, 0], ()), ([301, 66, 9, 0], (1,)), ([302, 0, 0, 0], ())):
        engine.dense = frozenset(dense)
        common = SimpleNamespace(num_reqs=4, seq_lens=torch.tensor(lengths).int(), block_table_tensor=tables)
        made = steps.metadata(common, engine)
        assert made.positions.tolist() == [n - 1 for n in lengths] and made.tables is not None
        assert made.whole.tolist() == [int(i in dense) for i in range(4)]
        seen.append((made.positions.data_ptr(), made.whole.data_ptr(), made.tables.data_ptr()))
    assert len(set(seen)) == 1


def test_the_device_is_asked_only_where_a_chunk_may_be_unsorted() -> None:
    steps = Steps(CONFIG, 4, torch.device("cpu"))
    assert steps.unread([FIRST - 2, 0], 1) == [0, 0]
    assert steps.unread([FIRST - 1, 0], 1) is None
    assert steps.unread([FIRST, 0], 1) == [1, 0]
    assert steps.unread([FIRST + 1, 0], 1) is None
    assert steps.unread([FIRST + 2, 9], 1) == [1, 0]  # another sequence
    assert steps.unread([FIRST + 3, 10], 2) == [1, 0]  # one in the place of another, of just that length
    steps.interrupt()
    assert steps.unread([FIRST + 4, 11], 2) == [1, 0]


def test_rows_that_see_everything_are_not_counted() -> None:
    steps, engine = Steps(CONFIG, 4, torch.device("cpu")), EngineCounters()
    layer = LayerCounters(CONFIG, KV_HEADS)
    engine.register(0, layer)
    layer.steady_tally(torch.device("cpu"))
    engine.dense = frozenset((1,))
    steps.count([FIRST, FIRST, 1, 0], engine)
    told = engine.take(0.0)
    assert told is not None and told.startswith("rows 2,") and "fallbacks 50.0%" in told
