"""Requests that ask for dense attention: answers, cache blocks, and who is told."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu_input_batch import InputBatch

from llama_surgery.serving.counting import EngineCounters
from llama_surgery.serving.vllm.model_state import SurgeryModelState
from llama_surgery.serving.vllm.modes import SWITCH, BatchModes, asks_for_dense
from llama_surgery.serving.vllm.scheduler import TileScheduler

pytestmark = pytest.mark.serve

DENSE = SamplingParams(extra_args={SWITCH: 1})
OPERATED = [SamplingParams(), SamplingParams(extra_args={SWITCH: 0, "else": 1})]


def hashes(params: SamplingParams, monkeypatch: pytest.MonkeyPatch, salt: str | None = None) -> list[Any]:
    """What the scheduler looks prefix blocks up by, for one prompt of two and a half blocks."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # else 0.26 begins each chain of hashes at random
    init_none_hash(sha256)
    given = {"cache_salt": salt, "block_hasher": get_request_block_hasher(16, sha256)}
    request = Request("0", list(range(40)), params, None, **given)
    monkeypatch.setattr(Scheduler, "add_request", lambda *_: None)
    TileScheduler.add_request(object.__new__(TileScheduler), request)
    assert len(request.block_hashes) == 2
    return list(request.block_hashes)


def test_no_block_is_shared_between_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, also = (hashes(params, monkeypatch) for params in OPERATED)
    dense = hashes(DENSE, monkeypatch)
    assert plain == also and dense == hashes(DENSE, monkeypatch)
    salted, dense_salted = (hashes(params, monkeypatch, "tenant") for params in (OPERATED[0], DENSE))
    # A salt that looks like another mode's.
    posing = [hashes(OPERATED[0], monkeypatch, salt) for salt in ("dense ", "dense tenant")]
    kinds = [plain, dense, salted, dense_salted, *posing]
    assert len({block for kind in kinds for block in kind}) == 2 * len(kinds)


@pytest.mark.parametrize(
    ("value", "dense"),
    [(True, True), ("true", True), ("1", True), ("false", False), ("0", False), (0, False)],
)
def test_words_of_the_switch(value: object, dense: bool) -> None:
    assert asks_for_dense(SamplingParams(extra_args={SWITCH: value})) == dense


class Other:
    """A logits processor of somebody else's."""


def test_the_switch_needs_no_generated_tokens() -> None:
    """Steps wait for them only where another processor may want them."""
    _, config = told()
    modes, batch = BatchModes(config, None, False), object.__new__(InputBatch)  # type: ignore[arg-type]
    batch.logitsprocs = LogitsProcessors([MinTokensLogitsProcessor.__new__(MinTokensLogitsProcessor), modes])
    for others, needed in ([], False), ([Other()], True):
        batch.logitsprocs.argmax_invariant.extend(others)
        batch.logitsprocs_need_output_token_ids = True
        assert batch.logitsprocs_need_output_token_ids == needed
    batch.logitsprocs_need_output_token_ids = False
    assert not batch.logitsprocs_need_output_token_ids


def told() -> tuple[EngineCounters, Any]:
    """Counters of an engine, and the configuration through which they are found."""
    engine = EngineCounters()
    layers = {"mlp": object(), "attn": SimpleNamespace(surgery=SimpleNamespace(engine=engine))}
    return engine, SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_batches_of_the_first_model_runner() -> None:
    engine, config = told()
    modes = BatchModes(config, None, False)  # type: ignore[arg-type]
    added = [(place, params, [], []) for place, params in enumerate([*OPERATED, DENSE, DENSE])]
    modes.update_state(BatchUpdate(4, removed=[], added=added, moved=[]))
    assert engine.dense == {2, 3} and modes.is_argmax_invariant() and modes.apply(1) == 1  # type: ignore[arg-type]
    swap = [(0, 3, MoveDirectionality.SWAP)]
    modes.update_state(BatchUpdate(3, removed=[2], added=[], moved=swap))
    assert engine.dense == {0}
    modes.update_state(None)
    modes.update_state(BatchUpdate(3, removed=[], added=[(0, OPERATED[0], [], [])], moved=[]))
    assert engine.dense == set()


@dataclasses.dataclass
class Rows:
    """What of the second model runner's batch is read."""

    idx_mapping_np: np.ndarray
    num_computed_tokens_np: np.ndarray
    is_prefilling_np: np.ndarray


def test_batches_of_the_second_model_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU. Tokens that are computed again after a preemption are a prompt to it, and not here."""
    dense = SurgeryModelState.__base__
    monkeypatch.setattr(dense, "add_request", lambda *_: None)
    monkeypatch.setattr(
        dense, "prepare_attn", lambda _, batch, *rest: {"told": batch.is_prefilling_np.tolist()}
    )
    engine, config = told()
    state = object.__new__(SurgeryModelState)
    state.vllm_config, state._prompts = config, np.zeros(4, dtype=np.int64)
    state._dense = np.ones(4, dtype=bool)
    for index, length, params in ((3, 100, DENSE), (1, 50, OPERATED[0])):
        new = {"prompt_token_ids": list(range(length)), "prefill_token_ids": [], "sampling_params": params}
        state.add_request(index, SimpleNamespace(**new))
    batch = Rows(np.array([1, 3, 3]), np.array([50, 64, 100]), np.ones(3, dtype=bool))
    assert state.prepare_attn(batch, None) == {"told": [False, True, False]}
    assert engine.dense == {1, 2}
