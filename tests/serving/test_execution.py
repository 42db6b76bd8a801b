"""The Triton kernels execute a scheduled batch as plain PyTorch does, and count the same."""

import dataclasses
from typing import Any

import pytest
import torch
from tests.serving.batches import CONFIG, DIM, KV_HEADS, SCALE, empty_cache, schedule, sequences, step
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from tests.serving.test_paged import learned

from llama_surgery.attention.impl.triton import job
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.select import launch as selection
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.counting import LayerCounters
from llama_surgery.serving.execution import Executor, executor_for, warm_up
from llama_surgery.serving.launches import launches
from llama_surgery.serving.paged import Scheduled
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.statistics import Statistics, summarise
from llama_surgery.topology.router import PageRouter

#: (prompt, length) of sequences, and how many of their tokens come in each step. The second one is computed
#: again after a preemption, from its prompt's end on: a piece of single rows that fills chunks.
LENGTHS = [(150, 152), (40, 135), (129, 130)]
STEPS = [(96, 40, 64), (54, 95, 65), (1, 0, 1), (1, 0, 0)]


def run(
    executor: Executor, router: PageRouter | None = None
) -> tuple[list[torch.Tensor], LayerCounters, list[torch.Tensor]]:
    """Attention of every sequence, what was counted, and what it should be."""
    waiting = sequences(LENGTHS, router)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = empty_cache(1 + sum(len(s.blocks) for s in waiting), executor, device)
    counters = LayerCounters(CONFIG, KV_HEADS)
    there = None if router is None else router.to(torch.device(device))
    got: dict[int, list[torch.Tensor]] = {id(s): [] for s in waiting}
    for news in STEPS:
        batch = [(s, new) for s, new in zip(waiting, news, strict=True) if new]
        for sequence, out in step(cache, batch, there, executor, counters):
            got[id(sequence)].append(out)
    return [torch.cat(parts, 2) for parts in got.values()], counters, [s.want for s in waiting]


def statistics(counters: LayerCounters) -> Statistics:
    return summarise({0: counters.by_tile}, CONFIG.page_size)


@pytest.mark.parametrize("router", [None, learned()], ids=["training-free", "learned"])
def test_kernels_do_what_plain_pytorch_does(router: PageRouter | None) -> None:
    got, counted, want = run(Executor(CONFIG, DIM, torch.float32, kernels=True), router)
    _, expected, _ = run(Executor(CONFIG, DIM, torch.float32), router)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=3e-5)
    assert statistics(counted) == statistics(expected)
    assert counted.dense_rows == expected.dense_rows > 0
    assert statistics(counted).by_tile.keys() == {"1", "8"} and statistics(counted).pages_read > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The kernels' error is that of plain PyTorch in the same dtype."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    got, _, want = run(Executor(CONFIG, DIM, dtype, kernels=True))
    plain, _, _ = run(Executor(CONFIG, DIM, dtype))
    for ours, theirs, true in zip(got, plain, want, strict=True):
        assert (ours.double() - true).abs().mean() <= 1.5 * (theirs.double() - true).abs().mean()


def test_little_memory_for_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are computed in as many launches as it takes, cut if need be."""
    monkeypatch.setattr(job, "STRIP_BYTES", 1 << 10)
    got, counted, want = run(Executor(CONFIG, DIM, torch.float32, kernels=True))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=3e-5)
    assert statistics(counted) == statistics(run(Executor(CONFIG, DIM, torch.float32))[1])


def test_what_a_launch_copies_is_bounded() -> None:
    """Sequences that share a long prefix: what is known of its pages is copied for each of them."""
    size, most = CONFIG.chunk_size, 40
    blocks = torch.arange(4)
    tile = CONFIG.tile
    pieces = [
        (
            Scheduled(4 * size - tile, 4 * size, tile * place, True, blocks),
            Part(4 * size - tile, 4 * size, tile),
        )
        for place in range(7)
    ]
    made = list(launches(pieces, CONFIG, 1, job.STRIP_BYTES // most))
    chunks = [len(launch.far) for launch in made]
    assert max(chunks) <= most and len(made) > 1
    assert sum(len(launch.pieces) for launch in made) == len(pieces)
    assert len(list(launches(pieces, CONFIG, 1, 1))) == 1


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, those that only make a view left out."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return lambda *args, **kwargs: None


def launched(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int, int]:
    """Launches of each kernel for prompts, and PyTorch's operations: in the first layer, in a later one."""
    waiting = sequences([(length, length) for length in lengths], None)
    executor = Executor(CONFIG, DIM, torch.float32, kernels=True)
    cache = empty_cache(1 + sum(len(s.blocks) for s in waiting), executor)
    step(cache, [(s, 64) for s in waiting], None, executor)
    work, states = schedule(cache, [(s, s.length - 64) for s in waiting])
    kernels = [Counted(prefill.attend_kernel), Counted(selection.scan_kernel)]
    counters = LayerCounters(CONFIG, KV_HEADS, quiet=True)
    operations = []
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "attend_kernel", kernels[0])
        patch.setattr(selection, "scan_kernel", kernels[1])
        for _ in range(2):
            with Operations() as counted:
                given = {"scale": SCALE, "router": None, "counters": counters}
                executor.attend(*states, cache, work, torch.empty_like(states[0]), **given)
            operations.append(counted.count)
    return [kernel.launches // 2 for kernel in kernels], *operations


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch's operations are counted on the CPU")
def test_prompts_of_a_step_are_launched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    two, first, later = launched([192, 256], monkeypatch)
    many, first_of_many, later_of_many = launched([192, 256, 136, 160, 224, 192, 200], monkeypatch)
    assert two == many == [1, 1]
    assert later == later_of_many < first == first_of_many


def test_other_sequences_may_be_broken() -> None:
    """A prompt whose keys, values and queries are NaN spoils no other prompt of its step."""
    executor = Executor(CONFIG, DIM, torch.float32, kernels=True)
    waiting = sequences([(150, 150), (200, 200), (100, 100), (180, 180)], None)
    for broken in waiting[1::2]:
        for states in (broken.queries, broken.keys, broken.values):
            states.fill_(torch.nan)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = empty_cache(1 + sum(len(s.blocks) for s in waiting), executor, device)
    outs = step(cache, [(s, s.length) for s in waiting], None, executor)
    for sequence, out in outs[::2]:
        torch.testing.assert_close(out.double(), sequence.want, rtol=3e-5, atol=3e-5)


def choose(*, backend: str = "triton", cache: torch.dtype = torch.float32, **changes: object) -> Executor:
    config = dataclasses.replace(CONFIG, backend=backend, **changes)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    return executor_for(config, DIM, device=cpu, dtype=torch.float32, cache_dtype=cache)


def test_who_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, the kernels run or say why they cannot."""
    assert not choose(backend="auto").kernels  # no GPU; the interpreter is for tests
    assert not choose(backend="gather").kernels
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose().kernels
    with pytest.raises(SurgeryError, match=r"queries are torch.float32, cached keys torch.bfloat16"):
        choose(cache=torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SurgeryError, match="cannot serve this model: it needs a GPU"):
        choose()


def test_kernels_are_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a prompt needs, and once for all layers alike."""
    calls = []
    attend = Executor.attend
    monkeypatch.setattr(Executor, "attend", lambda self, *a, **k: calls.append(1) or attend(self, *a, **k))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for kernels in (True, True, False):
        config = dataclasses.replace(CONFIG, theta_decode=0.0, dense_until=128)
        warm_up(Executor(config, DIM, torch.float32, kernels), 2 * KV_HEADS, KV_HEADS, device)
    assert len(calls) == 1
