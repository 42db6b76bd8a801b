"""Gradients through the kernels against autograd through plain float64 attention over the same pages."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from tests.attention.triton.calls import called

from llama_surgery.attention import api
from llama_surgery.attention.impl.triton import job
from llama_surgery.attention.impl.triton.backward import gradients as backward_pass
from llama_surgery.attention.impl.triton.backward import launch as backward
from llama_surgery.attention.impl.triton.backward import lists as backward_lists
from llama_surgery.attention.impl.triton.backward import summary as backward_summary
from llama_surgery.attention.impl.triton.backward.tuning import BackwardTuning
from llama_surgery.attention.impl.triton.tiled_plan import ENTRY, TiledPlan
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout, reorder
from llama_surgery.topology.layout import build_layout as plain_layout
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(
    chunk_size=64, page_size=16, window=32, tile=16, theta=0.06, theta_decode=0.03, summary="none"
)

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Case:
    """One call: streams of ``past`` keys, then ``rows`` queries with their own keys."""

    rows: int
    past: int = 0
    heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    streams: int = 2
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sink: bool = False
    tile: int | None = None
    spread: float = 2.0


def inputs(case: Case, device: torch.device) -> Tensors:
    """Queries, keys and values of the whole text, sink logits; and what the results are weighed by."""
    generator = torch.Generator().manual_seed(case.rows + 7 * case.past + case.heads + case.dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    value_dim = case.value_dim or case.dim
    shape = (case.streams, case.heads, case.rows)
    found = {
        "queries": case.spread * normal(*shape, case.dim),
        "keys": normal(case.streams, case.past + case.rows, case.dim),
        "values": normal(case.streams, case.past + case.rows, value_dim),
        "d_out": normal(*shape, value_dim),
        "d_lse": normal(*shape),
    }
    if case.sink:
        found["sink_logit"] = normal(case.streams, case.heads)
    return found


def leaves(given: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: x.detach().to(dtype).requires_grad_(not name.startswith("d_")) for name, x in given.items()}


def laid_out(keys: torch.Tensor, values: torch.Tensor, order: torch.Tensor | None, like: Layout | None):
    """The full chunks in a given order, differentiable."""
    if order is None or like is None:
        return None
    full = order.shape[1] * order.shape[2]
    return Layout(reorder(keys[:, :full], order), reorder(values[:, :full], order), order, like.moments)


def plain(
    x: Tensors,
    order: torch.Tensor | None,
    plans: list[TiledPlan],
    case: Case,
    config: SurgeryConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax over all keys in order of position: each row's near field and what the plans open."""
    streams, total, dim = x["keys"].shape
    tile = config.tile if case.tile is None else case.tile
    position = torch.arange(case.past, total, device=x["keys"].device)
    begin = torch.tensor([closed_chunks(int(p), config, tile) * config.chunk_size for p in position])
    key = torch.arange(total, device=position.device)
    near = (key <= position[:, None]) & (key >= begin.to(key.device)[:, None])
    visible = near.expand(streams, case.heads, case.rows, total).clone()
    for plan in plans:
        choosers, tiles = plan.counts.shape
        assert choosers == streams * (1 if tile == 1 else case.heads)
        for chooser, i in torch.cartesian_prod(torch.arange(choosers), torch.arange(tiles)):
            first_head = int(chooser) * streams * case.heads // choosers
            stream, first_head = divmod(first_head, case.heads)
            heads = slice(first_head, first_head + streams * case.heads // choosers)
            for place in range(int(plan.counts[chooser, i])):
                assert order is not None and plan.entries is not None
                page, first_open = divmod(int(plan.entries[chooser, i, place]), ENTRY)
                slot = torch.arange(page * config.page_size, (page + 1) * config.page_size)
                chunk = slot // config.chunk_size
                seen = chunk * config.chunk_size + order[stream, chunk, slot % config.chunk_size].long().cpu()
                anchor = (plan.start // tile + int(i)) * tile
                rows = range(max(anchor + first_open, plan.start), min(anchor + tile, plan.stop))
                for p in rows:
                    visible[stream, heads, p - case.past, seen] = True
    logits = x["queries"] @ x["keys"].unsqueeze(1).transpose(-1, -2) * dim**-0.5
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if "sink_logit" in x:
        sink = x["sink_logit"][..., None, None].expand(*logits.shape[:3], 1)
        lse = torch.cat((logits, sink), -1).logsumexp(-1)
    else:
        lse = logits.logsumexp(-1)
    return (logits - lse.unsqueeze(-1)).exp() @ x["values"].unsqueeze(1), lse


def run(
    case: Case, config: SurgeryConfig, device: torch.device
) -> tuple[list[TiledPlan], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plans, and by name the kernels' and the float64 results and gradients."""
    given = inputs(case, device)
    total = case.past + case.rows
    full = total // config.chunk_size * config.chunk_size
    built = plain_layout(given["keys"][:, :full], given["values"][:, :full], config) if full else None
    order = None if built is None else built.order
    x = leaves(given, case.dtype)
    options = {
        "config": config,
        "softcap": case.softcap,
        "sink_logit": x.get("sink_logit"),
    }
    layout = laid_out(x["keys"], x["values"], order, built)
    call = (x["queries"], x["keys"], x["values"], layout)
    result = called(backward.attend, *call, start=case.past, tile=case.tile, **options)
    out, lse, plans = result.out, result.lse, result.plans
    y = leaves({name: v for name, v in x.items()}, torch.float64)
    exact = plain(y, order, plans, case, config)
    got, want = {"out": out, "lse": lse}, dict(zip(("out", "lse"), exact, strict=True))
    for found, source in ((got, x), (want, y)):
        loss = (found["out"] * source["d_out"]).sum() + (found["lse"] * source["d_lse"]).sum()
        loss.backward()
        found |= {f"d_{n}": v.grad for n, v in source.items() if v.grad is not None}
    return plans, got, want


def check(case: Case, config: SurgeryConfig, device: torch.device) -> list[TiledPlan]:
    plans, got, want = run(case, config, device)
    for name, exact in want.items():
        top = float(exact.detach().abs().max())
        torch.testing.assert_close(
            got[name].double(), exact, rtol=0.0, atol=3e-6 * max(top, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )
    return plans


@pytest.mark.usefixtures("poisoned")
class TestAgainstPlainAttention:
    @pytest.mark.parametrize("rows", [1, 65, 120])
    def test_rows_from_the_start(self, rows: int, device: torch.device) -> None:
        assert bool(check(Case(rows), CONFIG, device)) == (rows > 96)

    @pytest.mark.parametrize(("past", "rows"), [(192, 1), (160, 31), (201, 40)])
    def test_rows_after_a_past(self, past: int, rows: int, device: torch.device) -> None:
        plans = check(Case(rows, past), CONFIG, device)
        assert plans[0].counts.any()

    @pytest.mark.parametrize("heads", [1, 3, 12])
    def test_groups(self, heads: int, device: torch.device) -> None:
        check(Case(20, 150, heads, streams=1), CONFIG, device)

    @pytest.mark.parametrize(("dim", "value_dim"), [(80, 80), (24, 40)])
    def test_head_dims(self, dim: int, value_dim: int, device: torch.device) -> None:
        check(Case(20, 140, 2, dim, value_dim, streams=1), CONFIG, device)

    def test_softcap(self, device: torch.device) -> None:
        check(Case(40, 128, softcap=2.0), CONFIG, device)

    def test_sink_logits(self, device: torch.device) -> None:
        check(Case(40, 128, sink=True), CONFIG, device)

    def test_lists_of_different_lengths(self, device: torch.device) -> None:
        plans = check(Case(40, 121, 3), CONFIG, device)
        assert plans[0].counts.min() < plans[0].counts.max()

    def test_softcap_with_sink_logits(self, device: torch.device) -> None:
        check(Case(40, 128, softcap=2.0, sink=True), CONFIG, device)

    def test_tiles_of_one_query(self, device: torch.device) -> None:
        check(Case(3, 197, 4, tile=1), CONFIG, device)

    def test_dense_until(self, device: torch.device) -> None:
        check(Case(60, 112, streams=1), dataclasses.replace(CONFIG, dense_until=144), device)

    def test_dense_everywhere(self, device: torch.device) -> None:
        assert not check(Case(90), dataclasses.replace(CONFIG, dense_until=1 << 20), device)

    def test_sizes_that_are_no_powers_of_two(self, device: torch.device) -> None:
        sizes = {"chunk_size": 192, "page_size": 24, "window": 24, "tile": 12}
        config = SurgeryConfig(**sizes, theta=0.03, summary="none")
        check(Case(31, 250, 3, 24, streams=1), config, device)

    def test_keys_far_from_the_origin(self, device: torch.device) -> None:
        """Logits of hundreds: weights without their log-sum-exp would overflow."""
        _, got, want = run(Case(20, 120, spread=100.0), CONFIG, device)
        for name, exact in want.items():
            error = (got[name].double() - exact).norm() / exact.norm()
            assert error < 1e-3, name

    def test_strips(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job, "STRIP_BYTES", 200)
        assert len(check(Case(110, 90, 1), CONFIG, device)) > 1

    def test_small_steps(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        small = BackwardTuning(rows=16, block_near=16, block_keys=16, block_rows=16)
        monkeypatch.setattr(backward_pass, "backward_tuning_for", lambda *_: small)
        monkeypatch.setattr(backward_lists, "LIST_BLOCK", 2)
        check(Case(36, 110, 3, streams=1), CONFIG, device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("summary", ["none", "page"])
@pytest.mark.parametrize(
    ("case", "strip_bytes", "elements"),
    [
        (Case(70, 105, streams=1), 1 << 28, 1 << 25),
        (Case(90, 100, 3, value_dim=24, softcap=8.0, sink=True), 400, 1 << 10),
        (Case(3, 197, 3, tile=1, sink=True), 1 << 28, 1 << 25),
    ],
    ids=["plain", "all", "single"],
)
def test_through_a_layout_it_equals_the_reference_backend(
    summary: str,
    case: Case,
    strip_bytes: int,
    elements: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Near keys, pages and what stands in for them are made of the same keys: their gradients meet there."""
    monkeypatch.setattr(job, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(backward_summary, "ELEMENTS", elements)
    given, grads = inputs(case, device), []
    router = PageRouter(
        mean_weight=1 + 0.1 * torch.randn(case.streams, case.heads, case.dim, device=device),
        variance_weight=1 + 0.1 * torch.randn(case.streams, case.heads, case.dim, device=device),
        summary=0.1 * torch.randn(case.streams, case.heads, device=device),
    )
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        x = leaves(given, dtype)
        config = dataclasses.replace(CONFIG, backend=backend, summary=summary)
        build: Callable = backward.build_layout if backend == "triton" else plain_layout
        full = x["keys"].shape[1] // config.chunk_size * config.chunk_size
        layout = build(x["keys"][:, :full], x["values"][:, :full], config)
        attend: Callable = api.attend
        if backend == "triton":
            attend = functools.partial(called, backward.attend)
        result = attend(
            x["queries"], x["keys"], x["values"], layout, config=config, start=case.past, tile=case.tile,
            softcap=case.softcap, sink_logit=x.get("sink_logit"), router=router,
        )  # fmt: skip
        ((result.out * x["d_out"]).sum() + (result.lse * x["d_lse"]).sum()).backward()
        grads.append([v.grad.double() for name, v in x.items() if not name.startswith("d_")])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_two_runs_agree_bit_by_bit(device: torch.device) -> None:
    first, second = (run(Case(20, 130, sink=True), CONFIG, device)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_asked_for_is_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("near_gradient_kernel", "far_gradient_kernel"):
        monkeypatch.setattr(backward_pass, name, None)
    given = inputs(Case(20, 130), device)
    layout = plain_layout(given["keys"][:, :128], given["values"][:, :128], CONFIG)
    queries = given["queries"].requires_grad_()
    result = called(
        backward.attend, queries, given["keys"], given["values"], layout, config=CONFIG, start=130
    )
    result.lse.sum().backward()
    assert queries.grad is not None and queries.grad.abs().sum() > 0


@pytest.mark.usefixtures("poisoned")
def test_readers_of_pages(device: torch.device) -> None:
    """Two tiles, three pages: tile 0 lists page 2, tile 1 lists pages 0 and 2."""
    listed = torch.tensor(
        [[[2 * ENTRY + 1, -7], [0 * ENTRY + 3, 2 * ENTRY]]], dtype=torch.int32, device=device
    )
    counts = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    readers, number = backward_lists.transpose(TiledPlan(0, 32, 16, counts, counts, listed), 3)
    assert number.tolist() == [[1, 0, 2]]
    assert readers[0, 0, :1].tolist() == [1 * ENTRY + 3]
    assert readers[0, 2].tolist() == [0 * ENTRY + 1, 1 * ENTRY + 0]


def dense_half(x: Tensors, visible: torch.Tensor, group: int) -> torch.Tensor:
    """PyTorch's own attention over a boolean mask."""
    keys, values = (x[name].unsqueeze(1).expand(-1, group, -1, -1) for name in ("keys", "values"))
    return torch.nn.functional.scaled_dot_product_attention(x["queries"], keys, values, attn_mask=visible)


def visible_keys(plans: list[TiledPlan], layout: Layout, case: Case, config: SurgeryConfig) -> torch.Tensor:
    """(streams, heads, rows, keys) bool: near field and what the plans open, keys in order of position."""
    total = case.past + case.rows
    position = torch.arange(case.past, total, device=layout.keys.device)
    first = position // config.tile * config.tile
    begin = ((first - config.window).clamp_min(0) // config.chunk_size) * config.chunk_size
    key = torch.arange(total, device=position.device)
    near = (key <= position[:, None]) & (key >= begin[:, None])
    seen = near.expand(case.streams * case.heads, -1, -1).clone()
    start = torch.arange(layout.chunks, device=key.device)[:, None] * config.chunk_size
    of_slot = (layout.order.long() + start).flatten(1).repeat_interleave(case.heads, 0)
    for plan in plans:
        opened = plan.first_open()
        rows = torch.arange(plan.start, plan.stop, device=key.device)
        by_page = opened[:, rows // plan.tile - plan.start // plan.tile] <= (rows % plan.tile)[:, None]
        by_slot = by_page.repeat_interleave(config.page_size, -1)
        index = of_slot[:, None, : by_slot.shape[-1]].expand_as(by_slot)
        far = torch.zeros((*by_slot.shape[:2], total), dtype=torch.bool, device=key.device)
        seen[:, rows - case.past] |= far.scatter_(-1, index, by_slot)
    return seen.unflatten(0, (case.streams, case.heads))


def check_half(case: Case, config: SurgeryConfig, device: torch.device) -> None:
    """Errors at most 1.5 times those of PyTorch's own kernel in the same precision over the same keys."""
    given = inputs(case, device)
    full = (case.past + case.rows) // config.chunk_size * config.chunk_size
    x = leaves(given, case.dtype)
    layout = backward.build_layout(x["keys"][:, :full], x["values"][:, :full], config)
    result = called(
        backward.attend, x["queries"], x["keys"], x["values"], layout, config=config, start=case.past
    )
    result.out.backward(x["d_out"])
    visible = visible_keys(result.plans, layout, case, config)
    outs, grads = {"ours": result.out}, {"ours": x}
    for name, dtype in (("exact", torch.float64), ("plain", case.dtype)):
        grads[name] = leaves(given, dtype)
        outs[name] = dense_half(grads[name], visible, case.heads)
        outs[name].backward(grads[name]["d_out"])

    def error(name: str, of: Callable[[str], torch.Tensor]) -> float:
        return float((of(name).double() - of("exact")).norm())

    kinds: dict[str, Callable[[str], torch.Tensor]] = {"out": lambda n: outs[n].detach()}
    for leaf in ("queries", "keys", "values"):
        kinds[leaf] = lambda n, leaf=leaf: grads[n][leaf].grad  # type: ignore[misc,return-value]
    for kind, of in kinds.items():
        assert error("ours", of) <= 1.5 * error("plain", of), kind


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    check_half(Case(40, 130, dtype=dtype, spread=1.0), CONFIG, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_long_rows_in_half_precision(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    config = SurgeryConfig(theta=0.01, summary="none")
    check_half(Case(1500, 1530, 4, dim, streams=2, dtype=dtype, spread=1.0), config, device)


@pytest.mark.gpu
def test_long_rows_do_not_depend_on_the_run(device: torch.device) -> None:
    given = inputs(Case(4096, 0, 4, 128, streams=2, dtype=torch.bfloat16), device)
    found = []
    for _ in range(2):
        x = leaves(given, torch.bfloat16)
        layout = backward.build_layout(x["keys"], x["values"], SurgeryConfig())
        result = called(
            backward.attend, x["queries"], x["keys"], x["values"], layout, config=SurgeryConfig(), start=0
        )
        result.out.backward(x["d_out"])
        found.append([x[name].grad for name in ("queries", "keys", "values")])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert isinstance(result, AttentionResult)


@pytest.mark.parametrize("strip_bytes", [1 << 28, 1 << 6], ids=["one strip", "several"])
def test_page_lists_are_saved_no_longer_than_they_are(
    strip_bytes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As saved tensors, which are given back after the backward pass, and with no memory behind them."""
    monkeypatch.setattr(job, "STRIP_BYTES", strip_bytes)
    config = dataclasses.replace(CONFIG, theta=0.6)
    case = Case(40, 160, streams=1)
    x, full = leaves(inputs(case, device), torch.float32), 128
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layout = backward.build_layout(x["keys"][:, :full], x["values"][:, :full], config)
        result = called(
            backward.attend, x["queries"], x["keys"], x["values"], layout, config=config, start=case.past
        )
    assert (len(result.plans) > 1) == (strip_bytes < 1 << 28)
    for plan in result.plans:
        longest = int(plan.counts.max())
        assert 0 < longest < config.pages_per_chunk * 2
        assert plan.entries is not None and plan.entries.shape == (*plan.counts.shape, longest)
        assert plan.entries.untyped_storage().nbytes() == 4 * plan.entries.numel()
        assert any(t.data_ptr() == plan.entries.data_ptr() and t.shape == plan.entries.shape for t in saved)
        assert plan.first_open().shape[-1] == plan.pages >= config.pages_per_chunk * 2
    result.out.backward(x["d_out"])
    with pytest.raises(RuntimeError, match="second time"):
        result.out.backward(x["d_out"])
