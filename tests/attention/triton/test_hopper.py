"""The kernels for Hopper against those that run anywhere; where they are taken, and where not."""

import dataclasses
import importlib.metadata
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton import test_prefill
from tests.attention.triton.calls import called
from tests.attention.triton.gluon_emulator import emulated

from llama_surgery.attention.impl.triton.hopper import launch as hopper
from llama_surgery.attention.impl.triton.job import Job, make_job
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.tuning import TABLE, Tuning
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(
    chunk_size=256, page_size=64, window=64, tile=64, theta=0.02, theta_decode=0.02
)  # fmt: skip

STREAMS = 3

LLAMA = test_prefill.Case(64, 600, 4, 128, dtype=torch.float16)

hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def both(
    given: dict[str, Any], config: SurgeryConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[AttentionResult, AttentionResult]:
    """A call with the kernels for Hopper, and without."""
    fast = called(prefill.attend, **given, config=config, keep_lists=True)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "attends", lambda _: False)
        return fast, called(prefill.attend, **given, config=config, keep_lists=True)


def check_attention(fast: AttentionResult, plain: AttentionResult) -> None:
    """The same but for the order of sums and the rounding of weights."""
    torch.testing.assert_close(fast.lse, plain.lse, rtol=1e-4, atol=1e-4)
    bound = 4e-3 if fast.out.dtype == torch.bfloat16 else 5e-4
    assert torch.isfinite(fast.out).all()
    assert (fast.out - plain.out).norm() <= bound * plain.out.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other kernels are to be interpreted")
@pytest.mark.usefixtures("poisoned")
class TestEmulated:
    """Their source on a CPU, threads for partitions: see ``gluon_emulator``."""

    @pytest.mark.parametrize(
        ("rows", "past", "heads", "dim", "changes"),
        [
            (1, 0, 4, 64, {}),
            (140, 470, 3, 64, {}),
            (100, 290, 7, 64, {"page_size": 16}),
            (400, 0, 1, 128, {}),
            (80, 333, 1, 128, {"page_size": 32}),
            (80, 400, 2, 64, {"summary": "none"}),
            (530, 0, 1, 64, {"dense_until": 448}),
            (70, 300, 2, 64, {"chunk_size": 128, "window": 128}),
        ],
    )
    def test_same_as_portable_kernels(
        self, rows: int, past: int, heads: int, dim: int, changes: dict[str, Any],
        device: torch.device, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        config = dataclasses.replace(CONFIG, **changes)
        case = test_prefill.Case(rows, past, heads, dim, dtype=torch.float16, sink=heads == 3, streams=2)
        given = test_prefill.inputs(case, config, device)
        given["router"] = PageRouter(torch.linspace(-0.5, 0.5, 2 * heads).reshape(2, heads))
        with emulated(monkeypatch):
            fast, plain = both(given, config, monkeypatch)
        assert bool(fast.plans) == (past + rows > 1)
        check_attention(fast, plain)

    def test_bfloat16(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        # Everything is open: what lists pages would multiply bfloat16 as integers, as it is interpreted.
        config = dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0)
        case = test_prefill.Case(70, 300, 2, 64, streams=1, dtype=torch.bfloat16)
        given = test_prefill.inputs(case, config, device)
        with emulated(monkeypatch):
            fast = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
        for name in ("queries", "near_keys", "near_values"):
            given[name] = given[name].float()  # type: ignore[attr-defined]
        full = given["near_keys"][:, :256], given["near_values"][:, :256]  # type: ignore[index]
        given["layout"] = build_layout(*full, config)
        exact = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
        assert (fast.out - exact.out).norm() < 0.03 * exact.out.norm()

    @pytest.mark.parametrize("page", [16, 64])
    def test_chunks_in_blocks_of_a_pool(
        self, page: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = dataclasses.replace(CONFIG, page_size=page)
        with emulated(monkeypatch):
            test_prefill.check_pool(test_prefill.inputs(LLAMA, config, device), config)

    def test_pieces_of_several_sequences(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        case = test_prefill.Case(90, 333, 2, 64, dtype=torch.float16)
        others = [dataclasses.replace(case, rows=rows, past=past) for rows, past in ((300, 0), (40, 536))]
        with emulated(monkeypatch):
            test_prefill.check_pieces(
                [case, *others], dataclasses.replace(CONFIG, page_size=32), device, 2e-3
            )

    def test_many_programs(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """More than there is to do, or one for everything."""
        case = test_prefill.Case(64, 600, 1, 64, dtype=torch.float16)
        given = test_prefill.inputs(case, CONFIG, device)
        outs = []
        for processors in (1, 7):
            with emulated(monkeypatch, processors):
                outs.append(called(prefill.attend, **given, config=CONFIG).out)  # type: ignore[arg-type]
        assert torch.equal(*outs)


@pytest.mark.gpu
@hopper_only
@pytest.mark.usefixtures("poisoned")
class TestAgainstPortableKernels:
    @pytest.mark.parametrize("page", [16, 32, 64])
    def test_chunks_in_blocks_of_a_pool(self, page: int, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, page_size=page)
        case = test_prefill.Case(517, 1111, 4, 128, dtype=torch.bfloat16)
        test_prefill.check_pool(test_prefill.inputs(case, config, device), config)

    @pytest.mark.parametrize("page", [16, 32, 64])
    def test_pieces_of_several_sequences(self, page: int, device: torch.device) -> None:
        case = test_prefill.Case(517, 1111, 4, 128, dtype=torch.bfloat16)
        others = [dataclasses.replace(case, rows=rows, past=past) for rows, past in ((300, 0), (4000, 960))]
        config = dataclasses.replace(CONFIG, page_size=page)
        test_prefill.check_pieces([case, *others], config, device, 2e-2)

    @pytest.mark.parametrize(
        ("heads", "dim", "dtype", "page"),
        [
            (4, 128, torch.bfloat16, 64),
            (3, 64, torch.float16, 32),
            (6, 128, torch.float16, 16),
            (1, 128, torch.bfloat16, 32),
            (7, 64, torch.bfloat16, 64),
        ],
    )
    @pytest.mark.parametrize(
        ("past", "rows", "sink"),
        [
            (0, 1, False),
            (0, 31, True),
            (0, 2000, False),
            (1500, 1530, True),
            (1111, 517, False),
            (3000, 64, False),
        ],
    )
    def test_attention(
        self, past: int, rows: int, sink: bool, heads: int, dim: int, dtype: torch.dtype,
        page: int, device: torch.device, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        case = test_prefill.Case(rows, past, heads, dim, dtype=dtype, sink=sink, streams=STREAMS)
        config = dataclasses.replace(CONFIG, page_size=page)
        fast, plain = both(test_prefill.inputs(case, config, device), config, monkeypatch)
        assert bool(fast.plans) == bool(past or rows > 320)
        check_attention(fast, plain)

    def test_large_logits(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        case = test_prefill.Case(900, 600, 4, 128, dtype=torch.bfloat16, streams=STREAMS)
        given = test_prefill.inputs(case, CONFIG, device)
        given["queries"] = given["queries"] * 60  # type: ignore[operator]
        fast, plain = both(given, CONFIG, monkeypatch)
        check_attention(fast, plain)

    def test_any_strides(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        case = test_prefill.Case(700, 600, 4, 128, dtype=torch.bfloat16, streams=STREAMS)
        given = test_prefill.inputs(case, CONFIG, device)
        expected = called(prefill.attend, **given, config=CONFIG)  # type: ignore[arg-type]
        for name, extra in (("queries", 3), ("near_keys", 8), ("near_values", 1)):
            states: Any = given[name]
            room = states.new_full((*states.shape[:-1], states.shape[-1] + extra), torch.nan)
            given[name] = room[..., : states.shape[-1]].copy_(states)
        got = called(prefill.attend, **given, config=CONFIG)  # type: ignore[arg-type]
        assert torch.equal(got.out, expected.out)
        assert torch.equal(got.lse, expected.lse)

    def test_replays_of_a_graph(self, device: torch.device) -> None:
        case = test_prefill.Case(1500, 600, 4, 128, dtype=torch.bfloat16, streams=STREAMS)
        given = test_prefill.inputs(case, CONFIG, device)
        expected = called(prefill.attend, **given, config=CONFIG)  # type: ignore[arg-type]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = called(prefill.attend, **given, config=CONFIG)  # type: ignore[arg-type]
        for _ in range(3):
            got.out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(got.out, expected.out)


def job_of(device: torch.device, case: test_prefill.Case, config: SurgeryConfig = CONFIG, **more: Any) -> Job:
    given = test_prefill.inputs(case, config, device) | more
    given.pop("tile")
    job = called(make_job, **given, config=config, tile=case.tile)  # type: ignore[arg-type]
    return dataclasses.replace(job, tuning=Tuning(specialised=True))


class TestWhereTheyAreTaken:
    def test_shapes_of_llama(self, device: torch.device) -> None:
        assert hopper.attends(job_of(device, LLAMA))

    def test_only_where_the_table_says_so(self, device: torch.device) -> None:
        assert [family for family, tuning in TABLE.items() if tuning.specialised] == ["sm90"]
        assert not hopper.attends(dataclasses.replace(job_of(device, LLAMA), tuning=TABLE["sm80"]))

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": torch.float32}, {"dim": 80}, {"dim": 256}, {"softcap": 30.0}, {"tile": 1},
        ],
    )  # fmt: skip
    def test_no_other_shapes(self, change: dict[str, Any], device: torch.device) -> None:
        assert not hopper.attends(job_of(device, dataclasses.replace(LLAMA, **change)))

    @pytest.mark.parametrize(("size", "taken"), [(8, False), (16, True), (32, True), (128, False)])
    def test_pages_that_blocks_are_made_of(self, size: int, taken: bool, device: torch.device) -> None:
        assert hopper.attends(job_of(device, LLAMA, dataclasses.replace(CONFIG, page_size=size))) is taken

    @pytest.mark.parametrize("summary", ["page", "none"])
    def test_summarised_or_not(self, summary: str, device: torch.device) -> None:
        assert hopper.attends(job_of(device, LLAMA, dataclasses.replace(CONFIG, summary=summary)))

    def test_no_other_tiles(self, device: torch.device) -> None:
        assert not hopper.attends(job_of(device, LLAMA, dataclasses.replace(CONFIG, tile=32)))

    @pytest.mark.parametrize("heads", [1, 8])
    def test_groups_of_any_size(self, heads: int, device: torch.device) -> None:
        assert hopper.attends(job_of(device, dataclasses.replace(LLAMA, heads=heads)))

    def test_learned_weights(self, device: torch.device) -> None:
        weights = torch.ones(LLAMA.streams, LLAMA.heads, LLAMA.dim)
        assert hopper.attends(job_of(device, LLAMA, router=PageRouter(None, weights, None, None, None)))

    @pytest.mark.parametrize(
        ("version", "known"),
        [
            ("3.5.1", False), ("3.6.0", True), ("3.6.0+git1a2b3c4d", True), ("3.7.0.post21", True),
            ("3.8", True), ("3.10.0", False), ("unknown", False),
        ],
    )  # fmt: skip
    def test_versions_of_triton_whatever_the_package_is_called(
        self, version: str, known: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr("triton.__version__", version)
        monkeypatch.setattr("importlib.metadata.version", missing)
        hopper._known_triton.cache_clear()
        try:
            assert hopper.attends(job_of(device, LLAMA)) is known
        finally:
            hopper._known_triton.cache_clear()
