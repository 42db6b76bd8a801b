"""Sequences on a small paged cache, and scheduled batches of them."""

import dataclasses

import torch

from llama_surgery.attention.api import attend
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.serving import paged
from llama_surgery.serving.counting import LayerCounters
from llama_surgery.serving.execution import Batch, Executor
from llama_surgery.serving.launches import make_launch
from llama_surgery.serving.paged import PagedStates, Scheduled, filled_blocks
from llama_surgery.surgery.rows import Part
from llama_surgery.surgery.store import SequenceStore
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import restore
from llama_surgery.topology.router import PageRouter

KV_HEADS, GROUP, DIM = 2, 2, 16
CONFIG = SurgeryConfig(
    chunk_size=64, page_size=16, window=32, tile=8, theta=0.05, theta_decode=0.02, summary="page"
)
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


def empty_cache(blocks: int, executor: Executor | None = None, device: str = "cpu") -> PagedStates:
    """Poisoned, and with strides that are not those of a contiguous tensor."""
    executor = executor or Executor(CONFIG, DIM, torch.float64)
    shape = (blocks, CONFIG.chunk_size, KV_HEADS, 2 * DIM)
    states = torch.full(shape, float("nan"), dtype=executor.dtype, device=device).transpose(1, 2)
    side = torch.full((blocks, KV_HEADS, executor.side_bytes() // 4), float("nan"), device=device)
    return executor.states(states[..., :DIM], states[..., DIM:], side)


def attend_piece(
    queries: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor],
    cache: PagedStates,
    blocks: torch.Tensor,
    part: Part,
    scale: float = SCALE,
    router: PageRouter | None = None,
) -> AttentionResult:
    """Attention of rows ``part`` of a sequence alone, queries (kv_heads, group, rows, dim)."""
    piece = Scheduled(part.start, part.stop, 0, True, blocks), part
    launch = make_launch([piece], cache.config, kernels=cache.kernels)
    return paged.attend(queries, near, cache, launch, torch.empty_like(queries), scale=scale, router=router)


def near_in_cache(
    cache: PagedStates, blocks: torch.Tensor, part: Part, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Near field of rows of a sequence of ``length`` tokens, all of whose full chunks are in tree order."""
    size, closed = cache.config.chunk_size, closed_chunks(part.start, cache.config, part.tile)
    found = []
    for held in (cache.keys, cache.values):
        chunks = [held[block] for block in blocks[closed : -(-part.stop // size)]]
        for place in range(min(len(chunks), length // size - closed)):
            order = cache.order(blocks[closed + place : closed + place + 1])
            chunks[place] = restore(chunks[place], order)
        found.append(torch.cat(chunks, 1)[:, : part.stop - closed * size])
    return found[0], found[1]


def schedule(
    cache: PagedStates, batch: list[tuple[Sequence, int]]
) -> tuple[Batch, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Write ``new`` rows of every sequence; returns them as a scheduled batch: queries, keys and values."""
    size, here = CONFIG.chunk_size, cache.keys
    tables = torch.full((len(batch), max(len(s.blocks) for s, _ in batch)), 2**30, dtype=torch.int32)
    scheduled, slots, row = [], [], 0
    for index, (sequence, new) in enumerate(batch):
        start, stop = sequence.done, sequence.done + new
        blocks = sequence.blocks[: -(-stop // size)]
        tables[index, : len(blocks)] = blocks
        prefilling = start < sequence.prompt
        scheduled.append(Scheduled(start, stop, row, prefilling, blocks.to(here.device)))
        position = torch.arange(start, stop)
        slots.append(blocks[position // size] * size + position % size)
        row += new

    def rows(name: str) -> torch.Tensor:
        """(rows, heads, dim) of the batch."""
        parts = [
            getattr(sequence, name).flatten(0, -3)[:, sequence.done : sequence.done + new]
            for sequence, new in batch
        ]
        return torch.cat(parts, 1).transpose(0, 1).to(here)

    filled = filled_blocks(scheduled, size)
    work = Batch(scheduled, tables.to(here.device), CONFIG, filled)
    queries, keys, values = (rows(name) for name in ("queries", "keys", "values"))
    cache.write(keys, values, torch.cat(slots).to(here.device))
    return work, (queries, keys, values)


def step(
    cache: PagedStates,
    batch: list[tuple[Sequence, int]],
    router: PageRouter | None,
    executor: Executor | None = None,
    counters: LayerCounters | None = None,
) -> list[tuple[Sequence, torch.Tensor]]:
    """Run one scheduled batch of ``new`` rows of every sequence.

    Returns:
        Each sequence with its attention (kv_heads, group, new, dim).
    """
    executor = executor or Executor(CONFIG, DIM, cache.keys.dtype)
    counters = counters or LayerCounters(CONFIG, KV_HEADS)
    work, states = schedule(cache, batch)
    out = torch.full_like(states[0], float("nan"))
    executor.attend(*states, cache, work, out, scale=SCALE, router=router, counters=counters)
    outs = []
    for (sequence, new), entry in zip(batch, work.sequences, strict=True):
        mine = out[entry.row : entry.row + new].unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
        sequence.done += new
        outs.append((sequence, mine.cpu()))
    return outs
