"""Copies out of a cache and into it are what indexing says, whatever its strides and widths."""

import pytest
import torch

from llama_surgery.serving.moves import in_a_row, put, take, take_rows

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
    held = torch.randint(100, [shape[axis] for axis in order]).to(dtype).permute(order)[..., dim:]
    assert torch.equal(take(held, BLOCKS), held[BLOCKS]) and take(held, BLOCKS).is_contiguous()
    assert torch.equal(in_a_row(held, BLOCKS), held[BLOCKS].transpose(0, 1).flatten(1, 2))
    block, row = BLOCKS[torch.tensor([0, 0, 2])], torch.tensor([7, 2, 5])
    assert torch.equal(take_rows(held, block, row), held[block, :, row].transpose(0, 1))
    states, want = torch.randint(100, (len(BLOCKS), HEADS, SIZE, dim)).float(), held.clone()
    want[BLOCKS] = states.to(dtype)
    put(held, BLOCKS, states)
    assert torch.equal(held, want)
