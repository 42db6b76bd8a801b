"""The kernels against the reference: same pages, same output, over odd sizes."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton.calls import called

from llama_surgery.attention import api
from llama_surgery.attention.impl.triton import job
from llama_surgery.attention.impl.triton.pieces import BEHIND, Piece, PieceTable
from llama_surgery.attention.impl.triton.prefill import launch as prefill
from llama_surgery.attention.impl.triton.tiled_plan import TiledPlan
from llama_surgery.attention.impl.triton.tuning import Tuning
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.topology.geometry import closed_chunks, query_blocks
from llama_surgery.topology.layout import Layout, build_layout
from llama_surgery.topology.plan import Plan, plan_from_first_open
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.06, theta_decode=0.03)


@dataclasses.dataclass
class Case:
    """One call: streams of ``past`` keys, then ``rows`` queries with their own keys."""

    rows: int
    past: int = 0
    heads: int = 2
    dim: int = 16
    streams: int = 2
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sink: bool = False
    tile: int | None = None
    sharpness: float = 2.0


def inputs(
    case: Case, config: SurgeryConfig, device: torch.device, router: PageRouter | None = None
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(case.rows + 7 * case.past + case.heads + case.dim)
    total = case.past + case.rows

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    queries = case.sharpness * normal(case.streams, case.heads, case.rows, case.dim)
    keys = normal(case.streams, total, case.dim)
    values = normal(case.streams, total, case.dim)
    full = total // config.chunk_size * config.chunk_size
    layout: Layout | None = None
    if full:
        layout = build_layout(keys[:, :full], values[:, :full], config, router)
    sink = normal(case.streams, case.heads) if case.sink else None
    return {
        "queries": queries,
        "near_keys": keys,
        "near_values": values,
        "layout": layout,
        "start": case.past,
        "tile": case.tile,
        "softcap": case.softcap,
        "sink_logit": sink,
        "router": router,
    }


def in_a_pool(layout: Layout, config: SurgeryConfig) -> job.PooledLayout:
    """The same chunks as blocks of an engine's cache, in any order, their rows before their heads."""
    (streams, _, dim), chunks, size = layout.keys.shape, layout.chunks, config.chunk_size
    blocks = torch.randperm(chunks + 2, generator=torch.Generator().manual_seed(0))[:chunks].to(
        layout.keys.device
    )
    pool = torch.full((chunks + 2, size, streams, 2 * dim), float("nan")).to(layout.keys).transpose(1, 2)
    states = torch.cat((layout.keys, layout.values), -1)
    pool[blocks] = states.unflatten(1, (chunks, size)).transpose(0, 1)
    keys, values = (
        x.as_strided((streams, (chunks + 2) * size, dim), (2 * dim, streams * 2 * dim, 1))
        for x in (pool[..., :dim], pool[..., dim:])
    )
    features = job.features_of(layout, layout.keys.dtype)
    sinks = layout.sink_pages(config.page_size).int()
    return job.PooledLayout(keys, values, blocks, size, features, layout.mean_values, sinks)


def check_pool(given: dict[str, object], config: SurgeryConfig) -> None:
    """Where chunks lie changes nothing, nor does where the output goes."""
    want = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
    streams, heads, rows, dim = want.out.shape
    out = torch.full((rows, streams, heads, dim), float("nan")).to(want.out).permute(1, 2, 0, 3)
    pool = in_a_pool(given["layout"], config)  # type: ignore[arg-type]
    got = called(prefill.attend, **given | {"layout": pool}, config=config, out=out)  # type: ignore[arg-type]
    assert got.out is out and torch.equal(got.lse, want.lse) and torch.equal(out, want.out)


def check_pieces(cases: list[Case], config: SurgeryConfig, device: torch.device, tolerance: float) -> None:
    """Rows of several sequences in one call are what each is alone; nobody sees another's numbers."""
    alone = [inputs(case, config, device) for case in cases]
    wants = [called(prefill.attend, **given, config=config) for given in alone]  # type: ignore[arg-type]
    each, behind, unused = config.pages_per_chunk, BEHIND, 3
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("q", "k", "v", "far", "sinks")}
    pieces, row, near, page, chunks = [], unused, 0, 0, [0]
    for case, given in zip(cases, alone, strict=True):
        layout = in_a_pool(given["layout"], config)  # type: ignore[arg-type]
        stop, more = case.past + case.rows, -(-behind // each)
        since = closed_chunks(case.past, config, config.tile) * config.chunk_size
        pieces.append(Piece(case.past, stop, row, near + since, page))
        parts["q"].append(torch.nn.functional.pad(given["queries"], (0, 0, unused, 0), value=torch.nan))  # type: ignore[arg-type]
        for name, states in (("k", given["near_keys"]), ("v", given["near_values"])):
            parts[name].append(torch.nn.functional.pad(states, (0, 0, 0, behind)))  # type: ignore[arg-type]
        own = torch.cat((layout.features, layout.mean_values.to(layout.features)), -1)  # type: ignore[union-attr]
        parts["far"].append(torch.nn.functional.pad(own, (0, 0, 0, more * each)))
        parts["sinks"].append(layout.sink_page)
        row, near = row + case.rows + unused, near + stop + behind
        page, chunks = page + own.shape[1] + more * each, [*chunks, len(layout.blocks) + more]  # type: ignore[arg-type]
    far, dim = torch.cat(parts["far"], 1), cases[0].dim
    held = [torch.zeros(len(far), page * config.page_size, dim).to(parts["k"][0]) for _ in range(2)]
    for index, given in enumerate(alone):
        first = sum(chunks[: index + 1]) * config.chunk_size
        for pool, states in zip(held, (given["layout"].keys, given["layout"].values), strict=True):  # type: ignore[attr-defined]
            pool[:, first : first + states.shape[1]] = states
    sinks = torch.stack(parts["sinks"])
    blocks = torch.arange(page // each, device=device)
    pooled = job.PooledLayout(
        *held, blocks, config.chunk_size, far[..., : 2 * dim], far[..., 2 * dim :].contiguous(), sinks
    )
    table, queries = PieceTable(pieces, config, config.tile, device), torch.cat(parts["q"], 2)
    given = {
        "queries": queries,
        "near_keys": torch.cat(parts["k"], 1),
        "near_values": torch.cat(parts["v"], 1),
    }
    out = torch.full_like(queries, torch.nan)
    got = called(prefill.attend, **given, layout=pooled, start=0, config=config, pieces=table, out=out)
    page_size = config.page_size
    for piece, want in zip(pieces, wants, strict=True):
        rows = slice(piece.row, piece.row + piece.stop - piece.start)
        torch.testing.assert_close(out[:, :, rows], want.out, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.lse[:, :, rows], want.lse, rtol=tolerance, atol=tolerance)
    assert len(got.plans) == 1 and out.isnan().any(-1).sum() == len(cases) * unused * out[..., 0, 0].numel()
    for name in ("executed_pairs", "visible_pairs"):
        counted = [sum(getattr(plan, name)(page_size) for plan in want.plans) for want in wants]
        assert torch.equal(getattr(got.plans[0], name)(page_size), sum(counted)), name


def block_plans(tiled: TiledPlan, config: SurgeryConfig) -> list[Plan]:
    """The same plan, cut into the blocks of rows of equal closed chunks."""
    first_open, plans = tiled.first_open(), []
    for block in query_blocks(tiled.start, tiled.stop, config, tiled.tile):
        if block.closed:
            first = block.start // tiled.tile - tiled.start // tiled.tile
            last = (block.stop - 1) // tiled.tile - tiled.start // tiled.tile
            opened = first_open[:, first : last + 1, : block.closed * config.pages_per_chunk]
            plans.append(plan_from_first_open(opened, block, tiled.tile))
    return plans


def check(
    case: Case, config: SurgeryConfig, device: torch.device, router: PageRouter | None = None
) -> AttentionResult:
    """Same pages and first-open rows as the reference, and the same attention to rounding."""
    given = inputs(case, config, device, router)
    result = called(prefill.attend, **given, config=config, keep_lists=True)  # type: ignore[arg-type]
    oracle = dataclasses.replace(config, backend="reference")
    expected = api.attend(**given, config=oracle)  # type: ignore[arg-type]
    plans = [plan for tiled in result.plans for plan in block_plans(tiled, config)]
    assert len(plans) >= len(expected.plans)
    page = config.page_size
    for name in ("executed_pairs", "visible_pairs"):
        got = sum(getattr(p, name)(page) for p in result.plans)
        want = sum(getattr(p, name)(page) for p in expected.plans)
        assert torch.as_tensor(got == want).all(), name
    if len(plans) == len(expected.plans):
        for plan, wanted in zip(plans, expected.plans, strict=True):
            assert plan.block == wanted.block
            assert torch.equal(plan.pages, wanted.pages)
            assert torch.equal(plan.first_open, wanted.first_open)
    torch.testing.assert_close(result.out, expected.out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.lse, expected.lse, rtol=2e-5, atol=2e-5)
    return result


@pytest.mark.usefixtures("poisoned")
class TestAgainstReference:
    @pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
    def test_rows_from_the_start(self, rows: int, device: torch.device) -> None:
        result = check(Case(rows), CONFIG, device)
        assert bool(result.plans) == (rows > 96)

    @pytest.mark.parametrize(("past", "rows"), [(192, 1), (160, 63), (96, 65), (201, 40)])
    def test_rows_after_a_past(self, past: int, rows: int, device: torch.device) -> None:
        assert check(Case(rows, past), CONFIG, device).plans

    @pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
    def test_groups(self, heads: int, device: torch.device) -> None:
        check(Case(50, 150, heads, streams=1), CONFIG, device)

    def test_a_group_wider_than_a_matrix_tile(self, device: torch.device) -> None:
        check(Case(16, 144, heads=12, streams=1), CONFIG, device)

    @pytest.mark.parametrize("dim", [64, 80])
    def test_head_dims(self, dim: int, device: torch.device) -> None:
        check(Case(40, 120, 2, dim, streams=1), CONFIG, device)

    @pytest.mark.parametrize("tile", [16, 64])
    def test_pieces_of_several_sequences(self, tile: int, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, tile=tile, window=64)
        check_pieces([Case(83, 121), Case(64, 0), Case(8, 312), Case(200, 128)], config, device, 2e-5)

    def test_softcap(self, device: torch.device) -> None:
        check(Case(64, 128, softcap=3.0), CONFIG, device)

    def test_sink_logits(self, device: torch.device) -> None:
        check(Case(64, 128, sink=True), CONFIG, device)

    def test_sharp_heads(self, device: torch.device) -> None:
        """Most balls' variance terms are beyond what their keys can reach."""
        config = dataclasses.replace(CONFIG, theta=0.01)
        for cap in (None, 20.0):
            case = Case(83, 121, 4, softcap=cap, sharpness=12.0)
            plain = check(dataclasses.replace(case, sharpness=2.0), config, device)
            assert not torch.equal(check(case, config, device).plans[0].rows_seen, plain.plans[0].rows_seen)

    @pytest.mark.parametrize("summary", ["none", "page"])
    def test_summaries(self, summary: str, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, summary=summary)
        check(Case(83, 121, 4), config, device)
        check(Case(3, 197, 4, tile=1), config, device)
        partly_dense = dataclasses.replace(config, dense_until=144)
        check(Case(200, 0, 3, 40, softcap=3.0, sink=True), partly_dense, device)

    def test_summaries_of_sizes_that_are_no_powers_of_two(self, device: torch.device) -> None:
        config = SurgeryConfig(chunk_size=192, page_size=24, window=24, tile=12, theta=0.03)
        check(Case(61, 260, 3, 24), config, device)

    def test_tiles_of_one_query(self, device: torch.device) -> None:
        check(Case(3, 197, 4, tile=1), CONFIG, device)

    @pytest.mark.parametrize("past", [0, 121])
    def test_a_threshold_that_falls(self, past: int, device: torch.device) -> None:
        """θ = 0.3 opens little until it falls; rows of other sequences are counted from their own start."""
        config = dataclasses.replace(CONFIG, theta=0.3, theta_decode=0.3, theta_length=110)
        found = check(Case(203 - past, past), config, device)
        one = check(Case(203 - past, past), dataclasses.replace(config, theta_length=0), device)
        pairs = [sum(int(p.executed_pairs(config.page_size).sum()) for p in f.plans) for f in (found, one)]
        assert pairs[0] > pairs[1]
        check_pieces([Case(83, 121), Case(64, 0), Case(200, 128)], config, device, 2e-5)

    def test_dense_until(self, device: torch.device) -> None:
        check(Case(200), dataclasses.replace(CONFIG, dense_until=144), device)

    def test_dense_everywhere(self, device: torch.device) -> None:
        assert not check(Case(150), dataclasses.replace(CONFIG, dense_until=1 << 20), device).plans

    def test_sizes_that_are_no_powers_of_two(self, device: torch.device) -> None:
        config = SurgeryConfig(chunk_size=192, page_size=24, window=24, tile=12, theta=0.03)
        check(Case(61, 260, 3, 24), config, device)

    def test_everything_open_is_dense(self, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0)
        case = Case(200)
        result = check(case, config, device)
        given = inputs(case, config, device)
        dense = called(
            prefill.attend,
            **given,
            config=dataclasses.replace(config, dense_until=1 << 20),  # type: ignore[arg-type]
        )
        torch.testing.assert_close(result.out, dense.out, rtol=2e-5, atol=2e-5)

    def test_strips(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job, "STRIP_BYTES", 100)
        assert len(check(Case(170, 30), CONFIG, device).plans) > 3

    @pytest.mark.parametrize(("page", "tile"), [(16, 16), (64, 16), (32, 1)])
    def test_chunks_in_blocks_of_a_pool(self, page: int, tile: int, device: torch.device) -> None:
        config = dataclasses.replace(CONFIG, page_size=page, theta_decode=0.01)
        check_pool(inputs(Case(50, 300, tile=tile), config, device), config)

    def test_several_pages_in_a_step(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Tuning(keys_per_step=16, block_near=16, block_pages=16, rows=32, score_rows=32)
        monkeypatch.setattr(job, "tuning_for", lambda *_: one)
        check(Case(90, 110, 4), CONFIG, device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    config = dataclasses.replace(CONFIG, theta=0.0, theta_decode=0.0)
    given = inputs(Case(70, 130, dtype=dtype), config, device)
    result = called(prefill.attend, **given, config=config)  # type: ignore[arg-type]
    assert result.out.dtype == dtype
    q, k, v = (given[name] for name in ("queries", "near_keys", "near_values"))
    assert isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    visible = torch.ones(70, 200, dtype=torch.bool, device=device).tril(130)
    exact, plain = (
        torch.nn.functional.scaled_dot_product_attention(
            q.to(kind), k[:, None].to(kind), v[:, None].to(kind), attn_mask=visible
        )
        for kind in (torch.float64, dtype)
    )
    error = (result.out.double() - exact).norm()
    assert error <= 1.5 * (plain.double() - exact).norm()


def test_what_the_kernels_do_not_run_is_refused(device: torch.device) -> None:
    given = inputs(Case(200, dtype=torch.float64), CONFIG, device)
    with pytest.raises(SurgeryError, match="float64"):
        api.attend(**given, config=dataclasses.replace(CONFIG, backend="triton"))  # type: ignore[arg-type]
