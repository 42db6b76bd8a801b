"""What the kernels of decode know of a cache: full chunks in tree order, the rest in order of position."""

import dataclasses

import torch
import triton

from llama_surgery.attention.impl.triton.decode.append_kernel import append_kernel
from llama_surgery.attention.impl.triton.decode.check import check_cache, check_tokens
from llama_surgery.attention.impl.triton.helpers import launching
from llama_surgery.config import SurgeryConfig


@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Keys and values of one layer in tensors that never move, so that a CUDA graph can hold them.

    A view of someone else's tensors, in blocks of one chunk: a sequence's chunks are blocks of its own one
    after the other (a :class:`PageBuffers`), or blocks of a pool that a table names (an engine's paged cache,
    whose tensors are expanded to all sequences). A *stream* is one KV head of one sequence; streams of a
    sequence follow each other. Full chunks are in tree order, the last one in order of position.

    A step is: :func:`append_tokens`, then ``decode``, for every layer; then ``lengths += kept``, where
    ``kept`` is how many of the new tokens stay (in speculative decoding perhaps not all). Layers may share
    ``lengths``. The owner of the tensors rewrites a chunk in tree order once it is full, at the latest
    before ``window`` more tokens are there. The host knows the lengths of its sequences, so nothing is asked
    of the device, and the step of every token is not burdened with what happens once in ``chunk_size``.

    Attributes:
        keys: (sequences, kv_heads, blocks, chunk_size, head_dim), any strides but the last, which is 1.
        values: (sequences, kv_heads, blocks, chunk_size, value_dim), likewise.
        lengths: (sequences,) int32, tokens that are settled: all before the step's new ones.
        features: (sequences, kv_heads, blocks, pages of a chunk, 2 * head_dim), μ and ½·σ² of pages as
            ``job.page_features`` gives them, the keys' dtype. None where nothing is known of pages: every
            query then sees all keys, and chunks may lie in any order.
        sink_page: (sequences, kv_heads, blocks) int32, page of a block that holds its first position; looked
            up for a sequence's first chunk. Beside ``features``.
        table: (sequences, chunks) int32, block of every chunk, entries behind the last chunk not looked at;
            None where the blocks are the chunks.
        mean_values: (sequences, kv_heads, blocks, pages of a chunk, value_dim), the values' dtype, where the
            configuration asks for summaries; else None.
        whole: (sequences,) int32, not 0 for sequences that see everything; None where none does.

    Raises:
        SurgeryError: Tensors that do not fit together.
    """

    config: SurgeryConfig
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    features: torch.Tensor | None = None
    sink_page: torch.Tensor | None = None
    table: torch.Tensor | None = None
    mean_values: torch.Tensor | None = None
    whole: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_cache(self)

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def streams(self) -> int:
        return self.lengths.shape[0] * self.kv_heads

    @property
    def chunks(self) -> int:
        """Chunks that a sequence has room for."""
        return self.keys.shape[2] if self.table is None else self.table.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.chunks * self.config.chunk_size

    @property
    def dense_until(self) -> int:
        """Positions below it see everything."""
        return self.capacity if self.features is None else self.config.dense_until

    def strides(self) -> tuple[int, ...]:
        """What the kernels know of where keys, values and the table lie."""
        row = 0 if self.table is None else self.table.stride(0)
        return *self.keys.stride()[:4], *self.values.stride()[:4], row


def page_strides(held: torch.Tensor | None) -> tuple[int | None, ...]:
    """What the kernels know of where a tensor (sequences, kv_heads, blocks, pages of a chunk, dim) lies."""
    return (None,) * 4 if held is None else held.stride()[:4]


def append_tokens(
    cache: DecodeCache, keys: torch.Tensor, values: torch.Tensor, *, longest: int | None = None
) -> None:
    """Write the newest tokens behind the settled ones. ``lengths`` stay; no host synchronisation.

    Args:
        keys: (streams, new, head_dim) after rotary embedding.
        values: (streams, new, value_dim).
        longest: Settled tokens of the longest sequence, where the host knows it: a cache without room for the
            new ones is refused. Where the host does not say, and lengths are on a GPU, tokens without room
            are left out, and :func:`decode` returns NaN for them.

    Raises:
        SurgeryError: Another shape or dtype than the cache's, or no room.
    """
    check_tokens(cache, keys, values, longest)
    streams, rows, dim = keys.shape
    value_dim = values.shape[-1]
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    with launching(keys):
        append_kernel[(streams,)](
            keys,
            values,
            cache.keys,
            cache.values,
            cache.lengths,
            cache.table,
            *keys.stride()[:2],
            *values.stride()[:2],
            *cache.strides(),
            cache.capacity,
            KV_HEADS=cache.kv_heads,
            ROWS=rows,
            ROWS_PAD=triton.next_power_of_2(rows),
            DIM=dim,
            DIM_PAD=triton.next_power_of_2(dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=triton.next_power_of_2(value_dim),
            CHUNK=cache.config.chunk_size,
            PAGED=cache.table is not None,
        )
