"""Attention on a paged cache equals the same attention on a contiguous one, whatever the batches were."""

import dataclasses

import pytest
import torch

from llama_surgery.attention.api import attend
from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.paged import (
    PagedStates,
    Scheduled,
    attend_paged,
    filled_blocks,
    piece,
    side_bytes,
)
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.router import PageRouter

KV_HEADS, GROUP, DIM = 2, 2, 16
CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8, theta=0.05, theta_decode=0.02)
SCALE = DIM**-0.5


@dataclasses.dataclass
class Sequence:
    """A sequence with its states, its blocks and what attention must give."""

    queries: torch.Tensor  # (kv_heads, group, n, dim)
    keys: torch.Tensor  # (kv_heads, n, dim)
    values: torch.Tensor
    prompt: int
    blocks: torch.Tensor
    want: torch.Tensor  # (kv_heads, group, n, dim)
    done: int = 0

    @property
    def length(self) -> int:
        return self.keys.shape[1]


def reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prompt: int, router: PageRouter | None
) -> torch.Tensor:
    """As in generate(): the prompt in one call, its incomplete last tile row by row, then decode steps."""
    outs, length = [], keys.shape[1]
    border = prompt - prompt % CONFIG.tile
    parts = [(0, border, CONFIG.tile), *((row, row + 1, 1) for row in range(border, length))]
    store = SequenceStore(CONFIG)
    for start, stop, tile in parts:
        if start == stop:
            continue
        since = closed_chunks(start, CONFIG, tile) * CONFIG.chunk_size
        near = store.append(keys[None, :, start:stop], values[None, :, start:stop], since, router)
        outs.append(
            attend(
                queries[:, :, start:stop],
                *near,
                store.layout,
                config=CONFIG,
                start=start,
                tile=tile,
                router=router,
            ).out
        )
    return torch.cat(outs, 2)


def sequences(lengths: list[tuple[int, int]], router: PageRouter | None) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    count = sum(-(-length // CONFIG.chunk_size) for _, length in lengths)
    numbers = torch.randperm(count, generator=generator) + 1  # block 0 is nobody's
    found = []
    for prompt, length in lengths:
        blocks = -(-length // CONFIG.chunk_size)
        mine, numbers = numbers[:blocks], numbers[blocks:]
        shape = (KV_HEADS, length, DIM)
        q = 3 * torch.randn(KV_HEADS, GROUP, length, DIM, generator=generator, dtype=torch.float64)
        k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        found.append(Sequence(q, k, v, prompt, mine, reference(q, k, v, prompt, router)))
    return found


def empty_cache(blocks: int) -> PagedStates:
    """Poisoned, and with strides that are not those of a contiguous tensor."""
    nan = float("nan")
    states = torch.full((blocks, CONFIG.chunk_size, KV_HEADS, 2 * DIM), nan, dtype=torch.float64).transpose(
        1, 2
    )
    side = torch.full((blocks, KV_HEADS, side_bytes(CONFIG, DIM) // 4), nan)
    return PagedStates(states, side, CONFIG)


def step(
    cache: PagedStates, batch: list[tuple[Sequence, int]], router: PageRouter | None
) -> list[tuple[Sequence, torch.Tensor]]:
    """Run one scheduled batch: ``new`` rows of every sequence; their attention."""
    scheduled, keys, values, slots, row = [], [], [], [], 0
    for sequence, new in batch:
        start, stop = sequence.done, sequence.done + new
        blocks = sequence.blocks[: -(-stop // CONFIG.chunk_size)]
        scheduled.append(Scheduled(start, stop, row, start < sequence.prompt, blocks))
        position = torch.arange(start, stop)
        slots.append(blocks[position // CONFIG.chunk_size] * CONFIG.chunk_size + position % CONFIG.chunk_size)
        keys.append(sequence.keys[:, start:stop].transpose(0, 1))
        values.append(sequence.values[:, start:stop].transpose(0, 1))
        row += new
    cache.write(torch.cat(keys), torch.cat(values), torch.cat(slots))
    cache.fill(filled_blocks(scheduled, CONFIG.chunk_size), router)
    outs = []
    for (sequence, new), entry in zip(batch, scheduled, strict=True):
        parts = [
            attend_paged(
                sequence.queries[:, :, part[0] : part[1]],
                cache,
                entry.blocks,
                part,
                entry.stop,
                scale=SCALE,
                router=router,
            ).out
            for part in entry.parts(CONFIG.tile)
        ]
        sequence.done += new
        outs.append((sequence, torch.cat(parts, 2)))
    return outs


def learned() -> PageRouter:
    generator = torch.Generator().manual_seed(5)
    return PageRouter(
        offset=torch.randn(KV_HEADS, GROUP, generator=generator),
        variance_weight=torch.rand(KV_HEADS, GROUP, DIM, generator=generator),
        key_map=torch.eye(DIM) + 0.3 * torch.randn(KV_HEADS, DIM, DIM, generator=generator),
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
        # The side cache holds moments in float32, as on a server: the pages opened are the same.
        torch.testing.assert_close(torch.cat(got[id(sequence)], 2), sequence.want, rtol=1e-9, atol=1e-9)


def test_block_that_is_filled_in_the_same_step_may_be_shared() -> None:
    first, second = sequences([(128, 128), (150, 150)], None)
    shared = slice(0, 64)
    second.keys[:, shared], second.values[:, shared] = first.keys[:, shared], first.values[:, shared]
    second.want = reference(second.queries, second.keys, second.values, second.prompt, None)
    cache = empty_cache(8)
    second.blocks[0], second.done = first.blocks[0], 64
    outs = step(cache, [(second, 86), (first, 128)], None)
    torch.testing.assert_close(outs[0][1], second.want[:, :, 64:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outs[1][1], first.want, rtol=1e-9, atol=1e-9)


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
