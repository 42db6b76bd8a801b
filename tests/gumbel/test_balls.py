"""Balls of the gumbel topology: their names, the mask and attention."""

import pytest
import torch

from llama_surgery.gumbel.balls import (
    attend_balls,
    ball_ids,
    ball_mask,
)


def random_balls(*shape: int, balls: int = 7, seed: int = 0) -> torch.Tensor:
    """Crowded towards the first balls, so that they differ in size and some are empty."""
    crowded = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).pow(2) * balls
    return crowded.long()


def test_a_mask_by_hand() -> None:
    """Six tokens of two binary digits, balls of those that share the last digit, window 2."""
    digits = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0], [0, 0], [1, 1]])
    balls = ball_ids(digits, 2, 1)
    assert balls.tolist() == [0, 1, 1, 0, 0, 1]
    assert ball_mask(balls, torch.arange(2, 6), 2).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]


@pytest.mark.parametrize("arity", [2, 3, 5])
@pytest.mark.parametrize("radius", [0, 1, 3, 4, 6])
def test_a_ball_holds_what_shares_the_last_digits(arity: int, radius: int) -> None:
    levels, n, window = 4, 24, 3
    digits = torch.randint(arity, (n, levels), generator=torch.Generator().manual_seed(arity))
    balls = ball_ids(digits, arity, radius)
    assert balls.max() < arity ** max(0, levels - radius)
    mask = ball_mask(balls, torch.arange(n), window)
    for i in range(n):
        for j in range(n):
            shared = 0
            while shared < levels and digits[i, levels - 1 - shared] == digits[j, levels - 1 - shared]:
                shared += 1
            near = levels - shared <= radius
            assert near == (balls[i] == balls[j])
            assert bool(mask[i, j]) == (j <= i and (j == 0 or i - j < window or near))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_is_a_masked_softmax(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last rows and of all, in strips of any length."""
    count, window, draw = 45, 7, torch.Generator().manual_seed(1)
    queries, keys, values = (
        torch.randn(2, number, count, dim, dtype=torch.float64, generator=draw)
        for number, dim in ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    )
    balls = random_balls(2, heads, count)
    for rows, elements in ((count, 1), (count, 1 << 20), (11, 4 * 2 * heads * count)):
        monkeypatch.setattr("llama_surgery.gumbel.balls.ELEMENTS", elements)
        mask = ball_mask(balls, torch.arange(count - rows, count), window)
        out, seen, read = attend_balls(queries[:, :, -rows:], keys, values, balls, window=window, scale=0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, -rows:], keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert torch.equal(seen, mask.sum((0, 2, 3))) and bool((read >= seen).all())
