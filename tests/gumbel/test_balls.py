"""Balls of the gumbel topology: their names, the mask, intervals in tree order, and blocks counted."""

import pytest
import torch
from benchmarks.ball_blocks import blocks_in_order_of_text, pages_read

from llama_surgery.gumbel.balls import (
    always_pairs,
    ball_ids,
    ball_intervals,
    ball_mask,
    order_serves,
    tree_order,
    window_pairs_read,
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


@pytest.mark.parametrize(
    ("count", "rows", "window", "slots"),
    [(1, 1, 1, 1), (40, 40, 5, 40), (63, 63, 70, 63), (50, 3, 1, 50), (50, 3, 8, 42), (50, 9, 8, 44)],
)
def test_intervals_and_window_make_up_the_mask(count: int, rows: int, window: int, slots: int) -> None:
    """Also with an order of the first tokens only, which lacks some of the windows' tokens."""
    balls = random_balls(2, 3, count)
    order = tree_order(balls[..., :slots])
    assert order_serves(order, count, window) and order.slots == slots
    found = ball_intervals(order, balls, rows, window)
    position = torch.arange(count - rows, count)
    slot = torch.arange(slots)
    by_slot = (slot >= found.low.unsqueeze(-1)) & (slot < found.high.unsqueeze(-1))  # rows in tree order
    key = order.positions.long().unsqueeze(-2).expand_as(by_slot)
    by_place = by_slot.new_zeros(2, 3, rows, count).scatter_(-1, key, by_slot)
    row = found.row_order.long().unsqueeze(-1).expand_as(by_place)
    ball = torch.zeros_like(by_place).scatter_(-2, row, by_place)
    always = ball_mask(torch.arange(count), position, window)  # every token a ball of its own
    assert not (ball & always).any()
    assert torch.equal(ball | always, ball_mask(balls, position, window))
    assert int(always.sum()) == always_pairs(count, window) - always_pairs(count - rows, window)


@pytest.mark.parametrize(("tile", "page"), [(1, 1), (4, 8), (16, 4), (64, 64)])
def test_pages_read_by_a_slow_loop(tile: int, page: int) -> None:
    count, rows = 70, 50
    balls = random_balls(1, 2, count)
    found = ball_intervals(tree_order(balls), balls, rows, 6)
    counts = pages_read(found, tile, page)
    assert counts.shape == (1, 2, -(-rows // tile))
    for head in range(2):
        for number in range(counts.shape[-1]):
            pages: set[int] = set()
            for place in range(number * tile, min(rows, (number + 1) * tile)):
                low, high = int(found.low[0, head, place]), int(found.high[0, head, place])
                pages.update(slot // page for slot in range(low, high))
            assert int(counts[0, head, number]) == len(pages)


@pytest.mark.parametrize(("tile", "block"), [(1, 1), (8, 16), (16, 8)])
def test_blocks_in_order_of_text_by_a_slow_loop(tile: int, block: int) -> None:
    count, window = 45, 4
    balls = random_balls(1, 2, count, balls=9)
    counts = blocks_in_order_of_text(balls, window, tile, block)
    mask = ball_mask(balls, torch.arange(count), window)
    for head in range(2):
        for number in range(counts.shape[-1]):
            rows = mask[0, head, number * tile : (number + 1) * tile]
            assert int(counts[0, head, number]) == sum(bool(part.any()) for part in rows.split(block, 1))


def test_blocks_of_the_window_by_a_slow_loop() -> None:
    count, rows, window, tile, page = 90, 41, 13, 16, 8
    pairs = 0
    for first in range(count - rows, count, tile):
        last = min(first + tile, count)
        keys = {key for row in range(first, last) for key in range(max(1, row - window + 1), row + 1)}
        pairs += (last - first) * (1 + -(-len(keys) // page) * page)
    assert window_pairs_read(count, rows, window, tile, page) == pairs
