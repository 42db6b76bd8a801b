"""The token-masked kernels against dense attention under the boolean mask."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from llama_surgery.attention.impl.triton import token_mask as masked
from llama_surgery.attention.impl.triton.token_mask_rule import BallRule, pack_paths, token_mask
from llama_surgery.attention.impl.triton.tuning import Tuning
from llama_surgery.errors import SurgeryError

RULE = BallRule(levels=6, radius=3, window=20, sinks=3)


@dataclasses.dataclass
class Case:
    rows: int
    past: int = 0
    heads: int = 2
    dim: int = 16
    value_dim: int | None = None
    streams: int = 2
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    shared: bool = False


def inputs(case: Case, rule: BallRule, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, query and key paths; with ``shared``, heads' queries walk as their keys do."""
    generator = torch.Generator().manual_seed(case.rows + 7 * case.past + case.heads)
    total, value_dim = case.past + case.rows, case.value_dim or case.dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    def paths(*shape: int) -> torch.Tensor:
        # Crowded towards the first branches, so that balls differ in size and some are empty.
        digits = torch.rand(*shape, rule.levels, generator=generator).pow(2) * rule.arity
        return pack_paths(digits.long(), rule.arity).to(device)

    key_paths = paths(case.streams, total)
    query_paths = paths(case.streams, case.heads, case.rows)
    if case.shared:
        query_paths = key_paths[:, None, case.past :].expand_as(query_paths)
    return (
        2 * normal(case.streams, case.heads, case.rows, case.dim),
        normal(case.streams, total, case.dim),
        normal(case.streams, total, value_dim),
        query_paths,
        key_paths,
    )


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = q.double(), k.double().unsqueeze(1), v.double().unsqueeze(1)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def check(case: Case, rule: BallRule, device: torch.device) -> masked.BallResult:
    q, k, v, query_paths, key_paths = inputs(case, rule, device)
    result = masked.attend_balls(q, k, v, query_paths, key_paths, rule, softcap=case.softcap)
    visible = token_mask(query_paths, key_paths, rule)
    out, lse = plain(q, k, v, visible, case.softcap)
    torch.testing.assert_close(result.out.double(), out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.lse.double(), lse, rtol=2e-5, atol=2e-5)
    assert torch.equal(result.near_pairs + result.seen_pairs, visible.sum((-1, -2)))
    assert (result.read_pairs >= result.seen_pairs).all()
    return result


def test_mask_by_hand() -> None:
    """Eight tokens, paths of two binary digits, balls of one shared digit, window 2, one sink."""
    rule = BallRule(levels=2, radius=1, window=2, sinks=1)
    digits = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [1, 0], [0, 0], [1, 1], [0, 1]])
    paths = pack_paths(digits, 2)[None]
    assert paths.tolist() == [[0, 2, 1, 3, 2, 0, 3, 1]]
    seen = token_mask(paths[:, None, 5:], paths, rule)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 1, 0],
        [1, 0, 1, 0, 0, 1, 1, 1],
    ]


def test_mask_by_a_slow_loop() -> None:
    rule = dataclasses.replace(RULE, arity=3, levels=3, radius=2, window=4, sinks=2)
    _, _, _, query_paths, key_paths = inputs(Case(9, 14), rule, torch.device("cpu"))
    mask = token_mask(query_paths, key_paths, rule)
    for (stream, head, row, key), seen in zip(
        torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist(),
        mask.flatten().tolist(),
        strict=True,
    ):
        position = 14 + row
        ball = int(query_paths[stream, head, row]) // 9 == int(key_paths[stream, key]) // 9
        assert seen == (key <= position and (key < 2 or position - key < 4 or ball))


@pytest.mark.usefixtures("poisoned")
class TestAgainstDenseAttention:
    @pytest.mark.parametrize("rows", [1, 19, 64, 131])
    def test_rows_from_the_start(self, rows: int, device: torch.device) -> None:
        check(Case(rows), RULE, device)

    @pytest.mark.parametrize(("past", "rows"), [(200, 1), (131, 70)])
    @pytest.mark.parametrize("shared", [False, True])
    def test_rows_after_a_past(self, past: int, rows: int, shared: bool, device: torch.device) -> None:
        check(Case(rows, past, shared=shared), RULE, device)

    @pytest.mark.parametrize(("dim", "value_dim"), [(80, 80), (24, 40)])
    def test_head_dims(self, dim: int, value_dim: int, device: torch.device) -> None:
        check(Case(40, 60, 3, dim, value_dim, streams=1), RULE, device)

    def test_softcap(self, device: torch.device) -> None:
        check(Case(40, 60, softcap=2.0), RULE, device)

    @pytest.mark.parametrize(
        "change",
        [
            {"radius": 0},
            {"radius": 6},
            {"sinks": 0},
            {"sinks": 70},
            {"window": 1},
            {"window": 500},
            {"arity": 5, "levels": 3, "radius": 1},
        ],
    )
    def test_rules(self, change: dict[str, int], device: torch.device) -> None:
        check(Case(70, 50), dataclasses.replace(RULE, **change), device)

    def test_one_ball_is_dense(self, device: torch.device) -> None:
        rule = dataclasses.replace(RULE, radius=RULE.levels)
        result = check(Case(70, streams=1), rule, device)
        assert (result.near_pairs + result.seen_pairs == 70 * 71 // 2).all()

    def test_small_steps_and_strips(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        small = Tuning(rows=16, block_near=16)
        monkeypatch.setattr(masked, "tuning_for", lambda *_: small)
        monkeypatch.setattr(masked, "STRIP_BYTES", 300)
        monkeypatch.setattr(masked, "LIST_BLOCK", 4)
        check(Case(90, 110), RULE, device)


def test_rows_in_tree_order_read_little_that_they_do_not_see(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "tuning_for", lambda *_: Tuning(rows=16, block_near=16))
    rule = BallRule(levels=3, radius=1, window=16)
    result = check(Case(600, heads=1, streams=1, shared=True), rule, device)
    # Causality hides half of a ball; beyond that, tiles and pages straddle borders of balls.
    assert result.read_pairs.sum() < 1.4 * result.seen_pairs.sum()


def check_half(case: Case, rule: BallRule, device: torch.device) -> None:
    """Errors at most 1.5 times those of PyTorch's own kernel in the same precision under the same mask."""
    q, k, v, query_paths, key_paths = inputs(case, rule, device)
    q = q / 2
    result = masked.attend_balls(q, k, v, query_paths, key_paths, rule)
    visible = token_mask(query_paths, key_paths, rule)
    exact, _ = plain(q, k, v, visible, None)
    keys, values = (x.unsqueeze(1).expand(-1, case.heads, -1, -1) for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
    error = (result.out.double() - exact).norm()
    assert result.out.dtype == case.dtype
    assert error <= 1.5 * (dense.double() - exact).norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    check_half(Case(70, 130, dtype=dtype), RULE, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_long_rows_in_half_precision(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    rule = BallRule(levels=11, radius=6)
    for shared in (False, True):
        check_half(Case(1500, 1530, 4, dim, dtype=dtype, shared=shared), rule, device)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"radius": 7}, "at most levels=6"), ({"window": 0}, "window=0"), ({"arity": 1}, "arity=1")],
)
def test_rules_out_of_range_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        dataclasses.replace(RULE, **change)


def test_calls_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, k, v, query_paths, key_paths = inputs(Case(20, 30), RULE, device)
    with pytest.raises(SurgeryError, match=r"key paths \(2, 49\)"):
        masked.attend_balls(q, k, v, query_paths, key_paths[:, 1:], RULE)
    with pytest.raises(SurgeryError, match="63 bits"):
        masked.attend_balls(q, k, v, query_paths, key_paths, BallRule(levels=60, radius=1))
    with pytest.raises(SurgeryError, match="float64"):
        masked.attend_balls(q.double(), k.double(), v.double(), query_paths, key_paths, RULE)
    with pytest.raises(SurgeryError, match="does not differentiate"):
        masked.attend_balls(q, k.requires_grad_(), v, query_paths, key_paths, RULE)
