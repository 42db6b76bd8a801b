"""One call of the kernels: its tensors, its tiles, and what is prepared for it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl.triton import LARGEST_SQUARE
from llama_surgery.attention.impl.triton.helpers import exact_products, pad_to_power
from llama_surgery.attention.impl.triton.pieces import PieceTable
from llama_surgery.attention.impl.triton.tuning import Tuning, family_of, tuning_for
from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks
from llama_surgery.topology.layout import Layout, Moments
from llama_surgery.topology.router import PageRouter

#: Most bytes that the page lists of one strip of tiles take. A list has room for every closed page, so
#: that none is ever lost; long calls run in strips to keep that cheap.
STRIP_BYTES = 1 << 28


class Strip(NamedTuple):
    """Consecutive tiles of one launch.

    Attributes:
        first_tile: Counted from position 0.
        tiles: How many.
        pages: Closed pages of the last tile, the most that any tile of the strip can list.
    """

    first_tile: int
    tiles: int
    pages: int


class PooledLayout(NamedTuple):
    """Full chunks in blocks of a pool, an engine's cache: keys and values lie where they are.

    Attributes:
        keys: (streams, slots, head_dim) of the whole pool, the last stride 1; each chunk in tree order.
        values: (streams, slots, value_dim), alike.
        blocks: (chunks,) int64, the block of every chunk; None where chunks follow each other.
        block_slots: From one block's first slot to the next one's.
        features: See :class:`Layout`.
        mean_values: See :class:`Layout`.
        sink_page: (streams,) int32, the page that holds position 0; of several pieces (pieces, streams), each
            within its own pages.
    """

    keys: torch.Tensor
    values: torch.Tensor
    blocks: torch.Tensor | None
    block_slots: int
    features: torch.Tensor
    mean_values: torch.Tensor | None
    sink_page: torch.Tensor

    def sink_pages(self, page_size: int) -> torch.Tensor:
        """See :class:`Layout`."""
        return self.sink_page


@dataclasses.dataclass(frozen=True)
class Job:
    """The rows of one call and how they are executed.

    Kernels know *choosers*, which list pages for themselves: a head in tiles of several rows, all heads of a
    KV head in tiles of one. The keys of a chooser are those of stream ``chooser // group``.

    Attributes:
        queries: (choosers, heads of each, rows, head_dim), rows at ``start … start + rows - 1``.
        near_keys, near_values: (streams, n, dim), the last n keys.
        layout: Full chunks, or None.
        features: What pages are scored by, (streams, pages, …) from :func:`page_features`; None without
            closed chunks.
        means: Mean values of the pages, (streams, pages, value_dim) in the queries' dtype, where these stand
            in for pages; else None.
        sink_logit: (streams, heads), or None.
        router: Learned corrections, for streams, contiguous; every part may be None.
        pieces: The rows, where they are several sequences'; else None, and they begin at ``start``.
    """

    queries: torch.Tensor
    near_keys: torch.Tensor
    near_values: torch.Tensor
    layout: Layout | PooledLayout | None
    features: torch.Tensor | None
    means: torch.Tensor | None
    sink_logit: torch.Tensor | None
    router: PageRouter
    config: SurgeryConfig
    start: int
    tile: int
    scale: float
    softcap: float | None
    tuning: Tuning
    pieces: PieceTable | None = None

    @property
    def blocks(self) -> tuple[torch.Tensor | None, int]:
        """Blocks of the chunks and how far apart they begin, if they are blocks of a pool."""
        layout = self.layout
        return (layout.blocks, layout.block_slots) if isinstance(layout, PooledLayout) else (None, 0)

    @property
    def stop(self) -> int:
        return self.start + self.queries.shape[2]

    @property
    def group(self) -> int:
        """Choosers of a stream."""
        return self.queries.shape[0] // self.near_keys.shape[0]

    @property
    def cap(self) -> float:
        """Cap of the logits, for kernels that ask ``CAP`` whether there is one."""
        return 1.0 if self.softcap is None else self.softcap

    def constants(self) -> dict[str, int]:
        """What kernels are compiled with, whatever they do: heads, tiles, channels and geometry."""
        dim, value_dim = self.queries.shape[-1], self.near_values.shape[-1]
        return {
            "GROUP": self.group,
            "HEADS": self.queries.shape[1],
            "TILE": self.tile,
            "TILE_PAD": triton.next_power_of_2(self.tile),
            "DIM": dim,
            "DIM_PAD": pad_to_power(dim),
            "VALUE_DIM": value_dim,
            "VALUE_PAD": pad_to_power(value_dim),
            "CHUNK": self.config.chunk_size,
            "WINDOW": self.config.window,
            "PAGE": self.config.page_size,
            "CAP": self.softcap is not None,
        }

    @property
    def near_start(self) -> int:
        """Position of the first near key."""
        return self.stop - self.near_keys.shape[1]

    def whole(self) -> Strip:
        """All tiles as one strip."""
        if self.pieces is not None:
            return Strip(0, len(self.pieces.fields), self.pieces.pages)
        first, last = self.start // self.tile, (self.stop - 1) // self.tile
        return Strip(first, last - first + 1, self.pages_of(last))

    def pages_of(self, tile: int) -> int:
        """Closed pages of a tile."""
        closed = closed_chunks(tile * self.tile, self.config, self.tile)
        return closed * self.config.pages_per_chunk

    def strips(self) -> Iterator[Strip]:
        """Cut the tiles so that the lists of one strip stay within STRIP_BYTES; those of pieces are."""
        if self.pieces is not None:
            yield self.whole()
            return
        first, tiles, _ = self.whole()
        room = STRIP_BYTES // (4 * self.queries.shape[0])
        last = first + tiles
        while first < last:
            count = last - first
            while count > 1 and count * self.pages_of(first + count - 1) > room:
                count = max(1, min(count - 1, room // self.pages_of(first + count - 1)))
            yield Strip(first, count, self.pages_of(first + count - 1))
            first += count


def make_job(
    call: AttentionCall,
    queries: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    layout: Layout | PooledLayout | None,
    *,
    start: int,
    sink_logit: torch.Tensor | None = None,
    pieces: PieceTable | None = None,
) -> Job:
    """Prepare a call, queries (streams, heads, rows, head_dim). See :func:`attend`."""
    config, tile, streams = call.config, call.tile, queries.shape[0]
    queries, near_keys, near_values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (queries, near_keys, near_values)
    )
    if tile > 1:
        queries = queries.flatten(0, 1).unsqueeze(1)
    features = means = None
    last = start + queries.shape[2] - 1
    if layout is not None and (pieces is not None or closed_chunks(last, config, tile)):
        features = features_of(layout, queries.dtype)
        if config.summarises(tile):
            assert layout.mean_values is not None
            means = layout.mean_values.to(queries.dtype)
    return Job(
        queries,
        near_keys,
        near_values,
        layout,
        features,
        means,
        None if sink_logit is None else sink_logit.contiguous(),
        (call.router or PageRouter()).for_streams(streams, queries.device),
        config,
        start,
        tile,
        call.scale,
        call.softcap,
        tuning_for(
            family_of(queries.device),
            queries.shape[-1],
            queries.element_size(),
            exact_products(queries.dtype),
        ),
        pieces,
    )


def features_of(layout: Layout | PooledLayout, dtype: torch.dtype) -> torch.Tensor:
    """What a layout's pages are scored by: kept features where there are any of this dtype."""
    if layout.features is not None and layout.features.dtype == dtype:
        return layout.features
    assert isinstance(layout, Layout)
    return page_features(layout.moments, dtype)


def page_features(moments: Moments, dtype: torch.dtype) -> torch.Tensor:
    """What selection multiplies queries with: (streams, pages, 2 * head_dim), μ and ½·σ² side by side.

    Of the pages of ``moments`` (float32), by which there are gradients where these are asked for.
    """
    spread = (0.5 * moments.variance).clamp_max(LARGEST_SQUARE)
    return torch.cat((moments.mean, spread), -1).to(dtype)


class KeptMoments(Moments):
    """Moments back from :func:`page_features`, float32, made when they are asked for: kernels do not."""

    def __init__(self, features: torch.Tensor, size: int) -> None:
        self.__dict__.update(features=features, size=size)

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        return self.__dict__["features"].chunk(2, -1)[0].float()

    @functools.cached_property
    def variance(self) -> torch.Tensor:
        return 2 * self.__dict__["features"].chunk(2, -1)[1].float()
