"""Blocks are put into tree order when their pages are first read, not when they fill."""

import dataclasses

import torch
from tests.serving.batches import CONFIG

from llama_surgery.serving.order import BlockOrder
from llama_surgery.serving.paged import Scheduled

CPU, SIZE = torch.device("cpu"), CONFIG.chunk_size
BLOCKS = torch.tensor([5, 2, 7, 3, 1, 6])


def order() -> BlockOrder:
    return BlockOrder(SIZE, lambda: 8, CPU)


def prompt(start: int, stop: int, **changes: object) -> Scheduled:
    made = Scheduled(start, stop, 0, True, BLOCKS[: -(-stop // SIZE)])
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_pieces_of_a_prompt() -> None:
    """The first piece reads two chunks sparsely and fills two more, which are sorted with the next one."""
    held = order()
    assert held.due([prompt(0, 4 * SIZE)], CONFIG).tolist() == [5, 2, 7]
    assert held.due([prompt(4 * SIZE, 5 * SIZE)], CONFIG).tolist() == [3]
    assert held.due([prompt(5 * SIZE, 6 * SIZE)], CONFIG).tolist() == [1]


def test_what_dense_rows_left() -> None:
    held, config = order(), dataclasses.replace(CONFIG, dense_until=4 * SIZE)
    assert not len(held.due([prompt(0, 4 * SIZE)], config))
    assert held.due([prompt(4 * SIZE, 5 * SIZE)], config).tolist() == [2, 3, 5, 7]
    assert not len(held.due([prompt(0, 6 * SIZE, whole=True)], CONFIG))


def test_chunks_that_steps_fill() -> None:
    held, tables = order(), torch.stack((BLOCKS, BLOCKS.flip(0))).int()
    assert not len(held.take(BLOCKS))
    held.note_steps(torch.tensor([2 * SIZE, 2 * SIZE + 1]), tables)
    held.note_steps(torch.tensor([2 * SIZE + 1, 3 * SIZE]), tables)
    held.note_steps(torch.tensor([0, 0]), tables)
    assert held.take(BLOCKS).tolist() == [2, 3] and not len(held.take(BLOCKS))
    held.note_steps(torch.tensor([4 * SIZE]), tables[:1])
    step = Scheduled(6 * SIZE - 1, 6 * SIZE, 0, False, BLOCKS)
    assert held.due([step], CONFIG).tolist() == [3] and held.take(BLOCKS).tolist() == [6]
