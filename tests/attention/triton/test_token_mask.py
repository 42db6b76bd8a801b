"""The token-masked kernels, and the plain executor, against dense attention under the boolean mask."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.ball_blocks import pages_read
from tests.gumbel.test_balls import random_balls

from llama_surgery.attention.impl.triton.tuning import Tuning
from llama_surgery.errors import SurgeryError
from llama_surgery.gumbel import attend
from llama_surgery.gumbel import token_mask as masked
from llama_surgery.gumbel.attend import BallResult, attend_balls
from llama_surgery.gumbel.balls import ball_intervals, ball_mask, tree_order, window_pairs_read

WINDOW = 20


@dataclasses.dataclass
class Case:
    rows: int
    past: int = 0
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    batch: int = 2
    dtype: torch.dtype = torch.float32
    balls: int = 7
    window: int = WINDOW

    def run(self, device: torch.device, backend: str = "triton") -> BallResult:
        return attend_balls(*self.inputs(device), window=self.window, backend=backend)

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values as strided as a model's are, and balls."""
        generator = torch.Generator().manual_seed(self.rows + 7 * self.past + self.heads)
        total = self.past + self.rows

        def normal(heads: int, count: int, dim: int) -> torch.Tensor:
            states = torch.randn(self.batch, count, heads, dim, generator=generator)
            return states.to(device, self.dtype).transpose(1, 2)

        queries = normal(self.heads, self.rows, self.dim)
        keys, values = (normal(self.kv_heads, total, dim) for dim in (self.dim, self.value_dim or self.dim))
        balls = random_balls(self.batch, self.heads, total, balls=self.balls, seed=self.past)
        return 2 * queries, keys, values, balls.to(device)

    def exact(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp in float64, and the mask."""
        q, k, v, balls = self.inputs(device)
        visible = ball_mask(balls, torch.arange(self.past, self.past + self.rows, device=device), self.window)
        k, v = (x.double().repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        logits = q.double() @ k.transpose(-1, -2) * self.dim**-0.5
        logits = logits.masked_fill(~visible, -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1), visible


def check(case: Case, device: torch.device, backend: str = "triton") -> BallResult:
    result, (out, lse, visible) = case.run(device, backend), case.exact(device)
    torch.testing.assert_close(result.out.double(), out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.lse.double(), lse, rtol=2e-5, atol=2e-5)
    assert torch.equal(result.seen_pairs, visible.sum((-1, -2)))
    assert (result.read_pairs >= result.seen_pairs).all()
    return result


@pytest.mark.usefixtures("poisoned")
class TestAgainstDenseAttention:
    @pytest.mark.parametrize("rows", [1, 19, 64, 131])
    def test_rows_from_the_start(self, rows: int, device: torch.device) -> None:
        check(Case(rows), device)

    @pytest.mark.parametrize(("past", "rows"), [(200, 1), (131, 70), (9, 3)])
    def test_rows_after_a_past(self, past: int, rows: int, device: torch.device) -> None:
        check(Case(rows, past), device)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1)])
    def test_groups(self, heads: int, kv_heads: int, device: torch.device) -> None:
        check(Case(40, 20, heads, kv_heads, batch=1), device)

    @pytest.mark.parametrize(("dim", "value_dim"), [(80, 80), (24, 40)])
    def test_head_dims(self, dim: int, value_dim: int, device: torch.device) -> None:
        check(Case(40, 60, 3, 1, dim, value_dim, batch=1), device)

    @pytest.mark.parametrize("window", [1, 2, 64, 500])
    def test_windows(self, window: int, device: torch.device) -> None:
        check(Case(70, 50, window=window), device)

    @pytest.mark.parametrize("balls", [1, 2, 500])
    def test_few_balls_and_many(self, balls: int, device: torch.device) -> None:
        result = check(Case(70, 50, balls=balls), device)
        if balls == 1:
            assert (result.seen_pairs == sum(range(51, 121))).all()

    def test_small_steps_and_strips(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        small = Tuning(rows=16, block_near=16)
        monkeypatch.setattr(masked, "tuning_for", lambda *_: small)
        monkeypatch.setattr(masked, "STRIP_BYTES", 300)
        monkeypatch.setattr(masked, "LIST_BLOCK", 4)
        check(Case(90, 110), device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("programs", [8, 64])
def test_steps_share_pages_and_keep_an_order(
    rows: int, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile, cut among 1 or 8 programs a head, through an order that lacks the last tokens."""
    monkeypatch.setattr(masked, "tuning_for", lambda *_: Tuning(rows=16, block_near=16))
    monkeypatch.setattr(masked, "PROGRAMS", programs)
    monkeypatch.setattr(masked, "PAGES_OF_A_SHARE", 1)
    case = Case(rows, 300, balls=3)
    out, lse, visible = case.exact(device)
    q, k, v, balls = case.inputs(device)
    order = tree_order(balls[..., : 300 + rows - WINDOW])
    result = attend_balls(q, k, v, balls, window=WINDOW, order=order, backend="triton")
    torch.testing.assert_close(result.out.double(), out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.lse.double(), lse, rtol=2e-5, atol=2e-5)
    assert torch.equal(result.seen_pairs, visible.sum((-1, -2)))
    with pytest.raises(SurgeryError, match=f"order holds 280 of {300 + rows} tokens"):
        attend_balls(q, k, v, balls, window=rows, order=tree_order(balls[..., :280]))


@pytest.mark.parametrize(("past", "rows"), [(0, 61), (70, 1), (30, 40)])
def test_the_plain_executor(
    past: int, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "STRIP", 16)
    result = check(Case(rows, past), device, "reference")
    assert (result.read_pairs >= sum(range(past + 1, past + rows + 1))).all()  # it skips nothing


@pytest.mark.parametrize(("past", "rows"), [(0, 230), (300, 1), (131, 70)])
def test_what_it_reads_is_what_balls_need(past: int, rows: int, device: torch.device) -> None:
    """Pairs counted by the kernels, against pages counted from the intervals."""
    case = Case(rows, past, balls=12)
    queries, _, values, balls = case.inputs(device)
    tile, page = masked.tile_and_page(queries, values)
    pages = pages_read(ball_intervals(tree_order(balls), balls, rows, WINDOW), tile, page)
    rows_of = torch.full(pages.shape[-1:], tile, device=device)
    rows_of[-1] = rows - tile * (len(rows_of) - 1)
    near = window_pairs_read(past + rows, rows, WINDOW, tile, page)
    assert torch.equal(case.run(device).read_pairs, (pages * rows_of).sum(-1) * page + near)


def test_rows_in_tree_order_read_little_that_they_do_not_see(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "tuning_for", lambda *_: Tuning(rows=16, block_near=16))
    case = Case(600, heads=1, kv_heads=1, batch=1, balls=4, window=16)
    result = check(case, device)
    # Causality hides half of a ball; beyond that, tiles and pages straddle borders of balls.
    assert result.read_pairs.sum() < 1.5 * result.seen_pairs.sum()


def check_half(case: Case, device: torch.device) -> None:
    """Errors at most 1.5 times those of PyTorch's own kernel in the same precision under the same mask."""
    result, (exact, _, visible) = case.run(device), case.exact(device)
    q, k, v, _ = case.inputs(device)
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert result.out.dtype == case.dtype
    assert (result.out.double() - exact).norm() <= 1.5 * (dense.double() - exact).norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    check_half(Case(70, 130, dtype=dtype), device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_long_rows_in_half_precision(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    for past, rows in ((1530, 1500), (3000, 1)):
        check_half(Case(rows, past, 8, 2, dim, dtype=dtype, balls=40, window=128), device)


def test_calls_that_do_not_fit_are_refused(device: torch.device) -> None:
    case = Case(20, 30)
    q, k, v, balls = case.inputs(device)
    with pytest.raises(SurgeryError, match="backend='tpu'"):
        attend_balls(q, k, v, balls, window=8, backend="tpu")
    with pytest.raises(SurgeryError, match="float64"):
        attend_balls(q.double(), k.double(), v.double(), balls, window=8, backend="triton")
    with pytest.raises(SurgeryError, match="does not differentiate"):
        attend_balls(q, k.requires_grad_(), v, balls, window=8, backend="triton")
