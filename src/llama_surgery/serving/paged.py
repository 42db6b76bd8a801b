"""Operated attention on an engine's paged cache. A cache block is a whole chunk.

A block's states lie in order of position while its chunk is open and in tree order from the step that fills
it. Beside them, in a side cache with the same block numbers, lie the chunk's order and its pages' moments.
Both depend on the chunk's own tokens alone, so blocks may be shared between sequences (prefix caching).
"""

import dataclasses
import functools

import torch

from llama_surgery.attention import api
from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.executor import build_layout, kernel_features
from llama_surgery.attention.result import AttentionResult
from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.launches import Launch
from llama_surgery.serving.moves import in_a_row, put, slots, take, take_rows
from llama_surgery.surgery.rows import Part, parts_of, sparse_parts
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """One sequence's share of a scheduled batch.

    Attributes:
        start: Position of its first row in the batch.
        stop: One past the position of its last row: its length after the step.
        row: Index of its first row in the batch.
        prefilling: The rows belong to the prompt: tiles of ``config.tile``. Else they are decode steps.
        blocks: (chunks,) int64, the cache block of every chunk up to ``stop``.
        whole: It asks for dense attention: all rows see everything.
    """

    start: int
    stop: int
    row: int
    prefilling: bool
    blocks: torch.Tensor
    whole: bool = False

    def parts(self, config: SurgeryConfig) -> list[Part]:
        """Runs of rows with one tile size. A piece of a prompt that is not its end must end at a multiple of
        ``tile``."""
        end = self.stop if self.prefilling else None
        return list(parts_of(self.start, self.stop, config, step=not self.prefilling, prompt_end=end))

    def sparse(self, config: SurgeryConfig) -> list[Part]:
        """Of :meth:`parts`, the rows that have a far field and do not read all of it."""
        return [] if self.whole else sparse_parts(self.parts(config), config)

    def far_chunks(self, config: SurgeryConfig) -> int:
        """Chunks that :meth:`sparse` rows have in their far fields: those that must be laid out for them."""
        return max(
            (closed_chunks(part.stop - 1, config, part.tile) for part in self.sparse(config)), default=0
        )

    def dense(self, config: SurgeryConfig) -> list[tuple[int, int]]:
        """Runs of all other rows, as (first position, one past the last)."""
        runs, at = [], self.start
        for part in (*self.sparse(config), Part(self.stop, self.stop, 1)):
            if at < part.start:
                runs.append((at, part.start))
            at = part.stop
        return runs


def piece(start: int, new: int, prompt: int, tile: int) -> int:
    """Tokens of a sequence to compute in this step, at most ``new`` from position ``start`` on.

    A piece of a prompt ends at a multiple of ``tile`` or with the prompt, so that no tile is computed in two
    calls. Generated tokens that are computed again after a preemption are a piece of their own.
    """
    stop = start + new
    if start >= prompt:
        return new
    if stop >= prompt:
        return prompt - start
    return max(0, stop - stop % tile - start)


def filled_blocks(batch: list[Scheduled], chunk_size: int) -> torch.Tensor:
    """(n,) int64: blocks whose chunks become full in this step."""
    blocks = [s.blocks[s.start // chunk_size : s.stop // chunk_size] for s in batch]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.int64)


#: The side cache of a chunk begins and ends at multiples of so many bytes, so that loads are wide.
ALIGNMENT = 64


def side_bytes(config: SurgeryConfig, head_dim: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the side cache for one chunk of one KV head.

    Args:
        config: The topology.
        head_dim: Of keys and values.
        dtype: The keys', where the kernels execute; None for plain PyTorch.
    """
    return -(-(_order_end(config, head_dim, dtype) + 4) // ALIGNMENT) * ALIGNMENT


def _order_end(config: SurgeryConfig, head_dim: int, dtype: torch.dtype | None) -> int:
    """Bytes of the side cache up to the end of the order, a multiple of 4."""
    numbers = (2 * config.pages_per_chunk + config.summaries_per_chunk) * head_dim
    size = numbers * (dtype or torch.float32).itemsize
    return size + size % 4 + 2 * (config.chunk_size + config.chunk_size % 2)


@dataclasses.dataclass(frozen=True)
class PagedStates:
    """One layer's caches, as the engine allocated them.

    The side cache of a chunk is what its pages are scored by and, if they are summarised, their mean values,
    then the chunk's order (int16) and the page of its first token (int32). Pages are scored by moments in
    float32 or, where the kernels execute, by their features in the keys' dtype, as are mean values.

    Attributes:
        keys: (blocks, kv_heads, chunk_size, head_dim), any strides; for the decode kernels any but the last.
        values: Alike.
        side: (blocks, kv_heads, side_bytes / 4) float32, the last stride 1.
        config: The topology.
        kernels: Do the kernels execute?
    """

    keys: torch.Tensor
    values: torch.Tensor
    side: torch.Tensor
    config: SurgeryConfig
    kernels: bool = False

    @property
    def head_dim(self) -> int:
        return self.keys.shape[-1]

    @property
    def _dtype(self) -> torch.dtype | None:
        return self.keys.dtype if self.kernels else None

    @functools.cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """See :func:`~.moves.slots`."""
        return slots(self.keys, self.values)

    @functools.cached_property
    def pages(self) -> torch.Tensor:
        """(blocks, kv_heads, pages of a chunk, …): :attr:`scores` and, if kept, :attr:`mean_values`."""
        pages, width = (
            self.config.pages_per_chunk,
            (2 if self.config.summary == "none" else 3) * self.head_dim,
        )
        numbers = self.side.view(self._dtype or torch.float32)[..., : pages * width]
        return numbers.unflatten(-1, (pages, width))

    @functools.cached_property
    def copied_bytes(self) -> int:
        """What a launch of the kernels copies of a closed chunk: see :func:`~.paged_kernels.pooled`."""
        held = [self.pages] if self.slots else [self.pages, self.keys, self.values]
        return sum(states[0].numel() * states.element_size() for states in held)

    @functools.cached_property
    def scores(self) -> torch.Tensor:
        """(blocks, kv_heads, pages of a chunk, 2 · head_dim): what pages are scored by, means first."""
        return self.pages[..., : 2 * self.head_dim]

    @functools.cached_property
    def mean_values(self) -> torch.Tensor | None:
        """(blocks, kv_heads, pages of a chunk, head_dim): mean values of full chunks' pages, if kept."""
        return None if self.config.summary == "none" else self.pages[..., 2 * self.head_dim :]

    @functools.cached_property
    def _orders(self) -> torch.Tensor:
        """(blocks, kv_heads, chunk_size) int16."""
        size = self.config.chunk_size
        stop = _order_end(self.config, self.head_dim, self._dtype) // 2 - size % 2
        return self.side.view(torch.int16)[..., stop - size : stop]

    @functools.cached_property
    def first_pages(self) -> torch.Tensor:
        """(blocks, kv_heads) int32: the page that holds a chunk's first token."""
        return self.side.view(torch.int32)[..., _order_end(self.config, self.head_dim, self._dtype) // 4]

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store (rows, kv_heads, head_dim) at ``slots`` (rows,), block · chunk_size + offset."""
        size = self.config.chunk_size
        for held, given in ((self.keys, keys), (self.values, values)):
            held[slots // size, :, slots % size] = given.to(held.dtype)

    def fill(self, blocks: torch.Tensor, router: PageRouter | None = None) -> None:
        """Rewrite full chunks in tree order and keep their order and moments.

        Args:
            blocks: (n,) int64, blocks whose last row was just written.
            router: Learned corrections of the layer, one for every KV head, or None.
        """
        if not len(blocks):
            return
        heads = self.keys.shape[1]
        # (n * kv_heads, chunk_size, head_dim)
        keys, values = take(self.keys, blocks).flatten(0, 1), take(self.values, blocks).flatten(0, 1)
        layout = build_layout(keys, values, self.config, router)
        if self.kernels:
            scores = kernel_features(layout, self.keys.dtype)
        else:
            scores = torch.cat((layout.moments.mean, layout.moments.variance), -1)
        for held, found in (
            (self.keys, layout.keys),
            (self.values, layout.values),
            (self.scores, scores),
            (self.mean_values, layout.mean_values),
            (self._orders, layout.order.flatten(1)),
            (self.first_pages, layout.sink_pages(self.config.page_size)),
        ):
            if held is not None and found is not None:
                put(held, blocks, found.unflatten(0, (-1, heads)))

    def order(self, blocks: torch.Tensor) -> torch.Tensor:
        """(kv_heads, n, chunk_size) int16: original offsets of the slots of full chunks."""
        return self._orders[blocks].transpose(0, 1)

    def layout(self, blocks: torch.Tensor, dtype: torch.dtype) -> Layout:
        """Full chunks of a sequence for plain PyTorch, copied: (kv_heads, n, …), states as ``dtype``."""
        means = self.mean_values
        return Layout(
            in_a_row(self.keys, blocks).to(dtype),
            in_a_row(self.values, blocks).to(dtype),
            self.order(blocks),
            Moments(*in_a_row(self.scores, blocks).split(self.head_dim, dim=-1), self.config.page_size),
            mean_values=None if means is None else in_a_row(means, blocks),
        )

    def near(
        self, launch: Launch, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Near fields of some rows of a step, piece after piece: keys and values (kv_heads, n, head_dim).

        To be read before the step's chunks are laid out: then those of its rows are in order of position. The
        order in earlier chunks is no matter, as all of these rows see all of them.

        Args:
            launch: The rows.
            keys: (rows, kv_heads, head_dim) of the whole step.
            values: Alike.
        """
        if isinstance(launch.near, tuple):
            return take_rows(self.keys, self.values, *launch.near)
        kind = self.keys.dtype
        return keys[launch.near].transpose(0, 1).to(kind), values[launch.near].transpose(0, 1).to(kind)


def attend(
    queries: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor],
    cache: PagedStates,
    launch: Launch,
    out: torch.Tensor,
    *,
    scale: float,
    router: PageRouter | None = None,
) -> AttentionResult:
    """Attention of some rows of a step; see :func:`llama_surgery.attention.api.attend`.

    The kernels read keys and values of closed chunks where they lie. For plain PyTorch these are copied.

    Args:
        queries: (kv_heads, group, rows, head_dim) of the whole step.
        near: Keys and values of the rows' near fields, from :meth:`PagedStates.near`.
        cache: With the rows' closed chunks in tree order.
        launch: The rows; for plain PyTorch one piece.
        out: (kv_heads, group, rows, head_dim) of the whole step, the last stride 1; written.
        scale: Scaling of q·k.
        router: Learned corrections of the layer, one for every KV head, or None.
    """
    far = launch.far
    if cache.kernels:
        from llama_surgery.attention.impl.triton.prefill.launch import attend as prefill
        from llama_surgery.serving.paged_kernels import pooled

        call = AttentionCall(cache.config, "triton", launch.pieces[0][1].tile, scale, router=router)
        pool = pooled(cache, far, launch.first) if len(far) else None
        return prefill(call, queries, *near, pool, start=0, pieces=launch.table, out=out)
    ((sequence, part),) = launch.pieces
    rows = slice(sequence.row + part.start - sequence.start, sequence.row + part.stop - sequence.start)
    layout = cache.layout(far, queries.dtype) if len(far) else None
    given = dict(config=cache.config, start=part.start, tile=part.tile, scale=scale, router=router)
    states = (held.to(queries.dtype) for held in near)
    result = api.attend(queries[:, :, rows], *states, layout, **given)
    out[:, :, rows] = result.out
    return result
