"""Attention on a paged cache equals the same attention on a contiguous one, whatever the batches were."""

import dataclasses

import pytest
import torch
from tests.serving.batches import (
    CONFIG,
    DIM,
    GROUP,
    KV_HEADS,
    empty_cache,
    reference,
    sequences,
    step,
)

from llama_surgery.serving.paged import Scheduled, piece
from llama_surgery.surgery.rows import Part
from llama_surgery.topology.router import PageRouter

#: The side cache holds moments and mean values in float32, as on a server: the pages opened are the same, and
#: what stands in for the others is as exact as that.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def learned() -> PageRouter:
    generator = torch.Generator().manual_seed(5)
    return PageRouter(
        offset=torch.randn(KV_HEADS, GROUP, generator=generator),
        variance_weight=torch.rand(KV_HEADS, GROUP, DIM, generator=generator),
        key_map=torch.eye(DIM) + 0.3 * torch.randn(KV_HEADS, DIM, DIM, generator=generator),
        summary=0.5 * torch.randn(KV_HEADS, GROUP, generator=generator),
    )


@pytest.mark.parametrize("router", [None, learned()], ids=["training-free", "learned"])
@pytest.mark.parametrize("budget", [24, 100, 1000])
def test_ragged_batches_equal_one_sequence_at_a_time(budget: int, router: PageRouter | None) -> None:
    waiting = sequences([(300, 340), (7, 30), (129, 129), (64, 200), (1, 70), (417, 430)], router)
    cache = empty_cache(1 + sum(len(s.blocks) for s in waiting))
    got: dict[int, list[torch.Tensor]] = {id(s): [] for s in waiting}
    while any(s.done < s.length for s in waiting):
        left, batch = budget, []
        for sequence in waiting:
            todo = sequence.prompt if sequence.done < sequence.prompt else sequence.done + 1
            new = min(todo, sequence.length) - sequence.done
            new = piece(sequence.done, min(new, left), sequence.prompt, CONFIG.tile) if new > 0 else 0
            if new > 0:
                batch.append((sequence, new))
                left -= new
        for sequence, out in step(cache, batch, router):
            got[id(sequence)].append(out)
    for sequence in waiting:
        torch.testing.assert_close(torch.cat(got[id(sequence)], 2), sequence.want, **CLOSE)


def test_block_that_is_filled_in_the_same_step_may_be_shared() -> None:
    first, second = sequences([(128, 128), (150, 150)], None)
    shared = slice(0, 64)
    second.keys[:, shared], second.values[:, shared] = first.keys[:, shared], first.values[:, shared]
    second.want = reference(second.queries, second.keys, second.values, second.prompt, None)
    cache = empty_cache(8)
    second.blocks[0], second.done = first.blocks[0], 64
    outs = step(cache, [(second, 86), (first, 128)], None)
    torch.testing.assert_close(outs[0][1], second.want[:, :, 64:], **CLOSE)
    torch.testing.assert_close(outs[1][1], first.want, **CLOSE)


@pytest.mark.parametrize(
    ("start", "new", "prompt", "want"),
    [
        (0, 100, 100, 100),  # the whole prompt
        (0, 50, 100, 48),  # cut at a whole tile
        (48, 7, 100, 0),  # not one tile left of the budget: wait
        (96, 9, 100, 4),  # a prompt's end, generated tokens computed again follow by themselves
        (100, 5, 100, 5),
        (100, 1, 100, 1),
    ],
)
def test_pieces_end_at_whole_tiles(start: int, new: int, prompt: int, want: int) -> None:
    assert piece(start, new, prompt, 8) == want


@pytest.mark.parametrize(
    ("start", "stop", "prefilling", "sparse", "dense"),
    [
        (0, 90, True, [], [(0, 90)]),  # no chunk is closed yet
        (0, 203, True, [Part(96, 200, 8)], [(0, 96), (200, 203)]),  # …, and the end of the prompt
        (128, 200, True, [Part(128, 200, 8)], []),
        (199, 200, False, [], [(199, 200)]),
        (203, 300, False, [], [(203, 300)]),  # computed again after a preemption
    ],
)
def test_rows_that_see_everything(
    start: int, stop: int, prefilling: bool, sparse: list[Part], dense: list[tuple[int, int]]
) -> None:
    config = dataclasses.replace(CONFIG, theta_decode=0.0)
    entry = Scheduled(start, stop, 0, prefilling, torch.empty(0, dtype=torch.int64))
    assert entry.sparse(config) == sparse and entry.dense(config) == dense
    until = dataclasses.replace(config, dense_until=160)
    assert all(part.start >= 160 for part in entry.sparse(until))
    assert entry.dense(dataclasses.replace(config, theta=0.0)) == [(start, stop)]
