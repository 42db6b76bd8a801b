"""Copies out of a cache and into it are what indexing says, whatever its strides and widths."""

import pytest
import torch

from llama_surgery.serving.moves import in_a_row, put, slots, take, take_rows

HEADS, SIZE = 3, 8
BLOCKS = torch.tensor([4, 1, 6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("dim", [16, 5])
@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)], ids=["heads", "rows", "channels"]
)
def test_copies(order: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """``order``: how the cache (blocks, heads, rows, channels) lies in memory; half of each row is it."""
    shape = 7, HEADS, SIZE, 2 * dim
    other, held = torch.randint(100, [shape[axis] for axis in order]).to(dtype).permute(order).chunk(2, -1)
    assert torch.equal(take(held, BLOCKS), held[BLOCKS]) and take(held, BLOCKS).is_contiguous()
    assert torch.equal(in_a_row(held, BLOCKS), held[BLOCKS].transpose(0, 1).flatten(1, 2))
    block, row = BLOCKS[torch.tensor([0, 0, 2])], torch.tensor([7, 2, 5])
    for pair in ((other, held), (held, other), (other.clone(), held)):
        for copied, kept in zip(take_rows(*pair, block, row), pair, strict=True):
            assert torch.equal(copied, kept[block, :, row].transpose(0, 1))
    states, want = torch.randint(100, (len(BLOCKS), HEADS, SIZE, dim)).float(), held.clone()
    want[BLOCKS] = states.to(dtype)
    put(held, BLOCKS, states)
    assert torch.equal(held, want)


def test_slots_are_views_where_rows_of_blocks_are_equally_far_apart() -> None:
    pool = torch.arange(5 * SIZE * HEADS * 8.0).view(5, SIZE, HEADS, 8).transpose(1, 2)
    keys, values, apart = slots(*pool.chunk(2, -1))  # type: ignore[misc]
    for block, row in ((0, 0), (3, 5), (4, SIZE - 1)):
        assert torch.equal(keys[:, block * apart + row], pool[block, :, row, :4])
        assert torch.equal(values[:, block * apart + row], pool[block, :, row, 4:])
    assert slots(pool[..., :4], pool.mT.contiguous().mT[..., 4:]) is None
