"""Who executes a scheduled batch on the paged cache: plain PyTorch, or the Triton kernels on a GPU."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from llama_surgery.attention.executor import kernels_run
from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.counting import LayerCounters, RowCount
from llama_surgery.serving.launches import Launch, launches
from llama_surgery.serving.paged import PagedStates, Scheduled, attend, filled_blocks, side_bytes
from llama_surgery.surgery.rows import Part
from llama_surgery.topology.geometry import causal_pairs, first_far
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class SingleRows:
    """Rows that are tiles of one query, each as a sequence of its own to the decode kernels.

    Attributes:
        where: (n,) int64, their indices in the batch.
        tables: (n, chunks) int32, the blocks of every row's sequence.
        positions: (n,) int32.
        count: What of them is known beforehand.
    """

    where: torch.Tensor
    tables: torch.Tensor
    positions: torch.Tensor
    count: RowCount


@dataclasses.dataclass
class Batch:
    """A scheduled batch: prompts' pieces and decode steps mixed, as they come. All layers share it.

    Attributes:
        sequences: What is computed.
        tables: (sequences, chunks) int32: their blocks, anything behind a sequence's end.
        config: The topology.
        filled: (n,) int64: blocks whose full chunks are to be laid out before the batch is computed.
        dense: Are rows that see everything left to the engine?
    """

    sequences: list[Scheduled]
    tables: torch.Tensor
    config: SurgeryConfig
    filled: torch.Tensor
    dense: bool = False
    _launches: dict[tuple[int | None, int], list[Launch]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def some(self, wanted: Callable[[int], bool], config: SurgeryConfig) -> "Batch":
        """The sequences whose places are wanted, read by another rule; with nothing left to the engine."""
        places = [place for place in range(len(self.sequences)) if wanted(place)]
        sequences = [self.sequences[place] for place in places]
        tables = self.tables[torch.tensor(places, dtype=torch.int64).to(self.tables.device)]
        return Batch(sequences, tables, config, filled_blocks(sequences, config.chunk_size))

    def launches(self, heads: int | None, chunk_bytes: int) -> list[Launch]:
        """All rows that are computed here but, where the kernels execute, :attr:`single_rows`.

        Args:
            heads: Query heads of a layer; None for plain PyTorch.
            chunk_bytes: :attr:`PagedStates.copied_bytes` of its cache.
        """
        key = heads, chunk_bytes
        if key not in self._launches:
            parts = self._long_parts() if heads else ((s, p) for s in self.sequences for p in self._parts(s))
            self._launches[key] = list(launches(list(parts), self.config, heads, chunk_bytes))
        return self._launches[key]

    def _parts(self, sequence: Scheduled) -> list[Part]:
        return sequence.sparse(self.config) if self.dense else sequence.parts(self.config)

    @functools.cached_property
    def dense_rows(self) -> RowCount:
        """Rows of prompts that see everything."""
        runs = [run for s in self.sequences if s.prefilling for run in s.dense(self.config)]
        rows, pairs = sum(b - a for a, b in runs), sum(causal_pairs(*run) for run in runs)
        none_closed = sum(max(0, min(b, first_far(self.config)) - a) for a, b in runs)
        return RowCount(rows, pairs, pairs, none_closed)

    def _long_parts(self) -> Iterator[tuple[Scheduled, Part]]:
        for sequence in self.sequences:
            for part in self._parts(sequence):
                stop = self._first_single(sequence, part)
                if part.start < stop:
                    yield sequence, part._replace(stop=stop)

    @functools.cached_property
    def single_rows(self) -> SingleRows | None:
        """The rows that the decode kernels can compute, or None where there is none."""
        where, owners, positions = [], [], []
        for owner, sequence in enumerate(self.sequences):
            for part in self._parts(sequence):
                for position in range(self._first_single(sequence, part), part[1]):
                    where.append(sequence.row + position - sequence.start)
                    owners.append(owner)
                    positions.append(position)
        if not where:
            return None
        chunks = max(positions) // self.config.chunk_size + 1
        rows = torch.tensor([where, owners, positions], device=self.tables.device)
        tables = self.tables[:, :chunks].index_select(0, rows[1]).int()
        return SingleRows(rows[0], tables, rows[2].int(), RowCount.of(positions, self.config))

    def _first_single(self, sequence: Scheduled, part: Part) -> int:
        """First position of the part's rows that are single ones; the part's end where none is.

        The decode kernels take the keys up to a row's own for the first ones of its chunk. In a chunk that
        was filled, and so reordered, in this step they are only if the row is its last.
        """
        first, last, tile = part
        if tile > 1 or (sequence.prefilling and self.config.tile == 1):
            return last
        if first + 1 == last == sequence.stop:
            return first
        size = self.config.chunk_size
        return min(last, max(first, sequence.stop // size * size))


@dataclasses.dataclass(frozen=True)
class Executor:
    """Attention of an operated layer on the engine's caches.

    Plain PyTorch on any device, one sequence after the other; or the Triton kernels: decode rows of all
    sequences in one call, pieces of all prompts in another.

    Attributes:
        config: The topology.
        head_dim: Of keys and values.
        dtype: Of keys and values as they are kept.
        kernels: Do the kernels execute?
        reason: Why not another one, for the log; or empty.
    """

    config: SurgeryConfig
    head_dim: int
    dtype: torch.dtype
    kernels: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        return "Triton kernels" if self.kernels else "plain PyTorch"

    def side_bytes(self) -> int:
        """Bytes of the side cache for one chunk of one KV head."""
        return side_bytes(self.config, self.head_dim, self.dtype if self.kernels else None)

    def states(self, keys: torch.Tensor, values: torch.Tensor, side: torch.Tensor) -> PagedStates:
        """One layer's caches: (blocks, kv_heads, chunk_size, head_dim) twice, and as :class:`PagedStates` has
        it (blocks, kv_heads, side_bytes / 4) float32."""
        config = self.config if self.kernels else dataclasses.replace(self.config, backend="gather")
        return PagedStates(keys, values, side, config, self.kernels)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cache: PagedStates,
        batch: Batch,
        out: torch.Tensor,
        *,
        scale: float,
        router: PageRouter | None,
        counters: LayerCounters,
    ) -> None:
        """Attention of all rows of a batch.

        Args:
            queries: (rows, heads, head_dim); query heads of a KV head are neighbours.
            keys: (rows, kv_heads, head_dim).
            values: Alike.
            cache: What :meth:`states` gave, with the batch's keys written. Chunks are laid out here.
            batch: The batch.
            out: (rows, heads, head_dim), written.
            scale: Scaling of q·k.
            router: Learned corrections of the layer, or None.
            counters: Count what is read.
        """
        thetas = {"theta": batch.config.theta, "theta_decode": batch.config.theta_decode}
        if any(getattr(cache.config, name) != theta for name, theta in thetas.items()):
            cache = dataclasses.replace(cache, config=dataclasses.replace(cache.config, **thetas))
        parts = batch.launches(queries.shape[1] if self.kernels else None, cache.copied_bytes)
        kv_heads = cache.keys.shape[1]
        nears = [cache.near(launch, keys, values) for launch in parts]
        cache.fill(batch.filled, router)
        by_head, into = (x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) for x in (queries, out))
        for launch, near in zip(parts, nears, strict=True):
            result = attend(by_head, near, cache, launch, into, scale=scale, router=router)
            counters.add_parts([part for _, part in launch.pieces], result)
        single = batch.single_rows if self.kernels else None
        if single is not None:
            from llama_surgery.serving.paged_kernels import decode_rows

            tally, chosen = counters.tally(out.device), queries[single.where]
            out[single.where] = decode_rows(
                chosen, cache, single.tables, single.positions, scale=scale, router=router, tally=tally
            )
            counters.add_rows(single.count)


@functools.cache
def warm_up(executor: Executor, heads: int, kv_heads: int, device: torch.device) -> None:
    """Compile the kernels for prompts, by a short one of random states.

    Args:
        executor: Whose kernels; another one needs none.
        heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        device: Where the caches will be.
    """
    if not executor.kernels:
        return
    config = dataclasses.replace(executor.config, dense_until=0)
    size, dim = config.chunk_size, executor.head_dim
    chunks = first_far(config) // size + 2
    kind = {"dtype": executor.dtype, "device": device}
    queries = torch.randn(chunks * size, heads, dim, **kind)
    keys, values = torch.randn(2, chunks * size, kv_heads, dim, **kind)
    side = torch.zeros(chunks, kv_heads, executor.side_bytes() // 4, device=device)
    held = torch.zeros(2, chunks, kv_heads, size, dim, **kind)
    cache = dataclasses.replace(executor, config=config).states(*held, side)
    cache.write(keys, values, torch.arange(chunks * size, device=device))
    blocks = torch.arange(chunks, device=device)
    prompt = Scheduled(0, chunks * size, 0, True, blocks)
    batch = Batch([prompt], blocks[None].int(), config, blocks[:-1], dense=True)
    given = {"scale": dim**-0.5, "router": None, "counters": LayerCounters(config, kv_heads)}
    executor.attend(queries, keys, values, cache, batch, torch.empty_like(queries), **given)


def executor_for(
    config: SurgeryConfig,
    head_dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> Executor:
    """The executor that ``config.backend`` asks for, or for ``auto`` the fastest that can.

    Args:
        config: The topology.
        head_dim: Of keys and values.
        device: Where the caches are.
        dtype: Of the queries.
        cache_dtype: Of keys and values as they are kept.

    Raises:
        SurgeryError: The kernels were asked for by name and cannot run the layer.
    """

    def problem() -> str | None:
        from llama_surgery.attention.impl import triton

        queries = torch.empty(1, head_dim, device=device, dtype=dtype)
        found = triton.obstacle(config, queries, queries, config.tile)
        if found is not None:
            return found
        from llama_surgery.attention.impl.triton.decode.launch import decode_obstacle

        if dtype != cache_dtype:
            return f"queries are {dtype}, cached keys {cache_dtype}"
        return decode_obstacle(config, queries)

    kernels, reason = kernels_run(config.backend, device, problem, "serve this model")
    return Executor(config, head_dim, cache_dtype, kernels, reason)
