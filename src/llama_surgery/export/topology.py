"""The plan of one text as block-sparse arrays: what is in the file, and back to plans that run here.

``docs/topology-format.md`` describes the file.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import Block, closed_chunks, query_blocks
from llama_surgery.topology.plan import Plan
from llama_surgery.topology.tree import paths


@dataclasses.dataclass(frozen=True)
class LayerTopology:
    """Block-sparse rows of one layer: a row of blocks is a tile, a column a page, for every chooser.

    Choosers are the query heads in order; with tiles of one row, and in files of format version 1, they
    are the KV heads, each for all its query heads.

    Attributes:
        group: Query heads of a KV head; the keys of query head h are those of KV head ``h // group``.
        indptr: (choosers, tiles + 1) int64; tile t of chooser c reads entries ``indptr[c, t]`` up to
            ``indptr[c, t + 1]``.
        indices: (entries,) int32, pages, ascending within a tile.
        first_row: (entries,) int32; rows of the tile from this one on, counted from 0, see the page.
        positions: (kv_heads, pages, page_size) int32, the token in every slot of every page.
    """

    group: int
    indptr: np.ndarray
    indices: np.ndarray
    first_row: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Topology:
    """What every operated layer sees of one text.

    Attributes:
        model: Name of the model.
        config: The topology's configuration.
        tokens: (length,) int64, the text.
        layers: By layer index.
    """

    model: str
    config: SurgeryConfig
    tokens: np.ndarray
    layers: dict[int, LayerTopology]

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def tile_start(self) -> np.ndarray:
        """(tiles,) int64: position of every tile's first row; the last tile may be partial."""
        return np.arange(0, self.length, self.config.tile)

    @property
    def near_start(self) -> np.ndarray:
        """(tiles,) int64: rows of a tile see every position from here to their own."""
        tile, size = self.config.tile, self.config.chunk_size
        return np.array(
            [closed_chunks(int(start), self.config, tile) * size for start in self.tile_start], dtype=np.int64
        )

    @property
    def pages(self) -> int:
        """Pages that some tile may read: those of the chunks that are closed for the last one."""
        return int(self.near_start[-1]) // self.config.page_size

    @property
    def page_path(self) -> np.ndarray:
        """(pages, depth) int16: digits of every page's path in its chunk's tree, most significant first."""
        config = self.config
        digits = paths(torch.arange(config.chunk_size), config.page_size)[:: config.page_size]
        chunks = self.pages // config.pages_per_chunk
        return np.tile(digits.numpy().astype(np.int16), (chunks, 1))

    def order(self, layer: int) -> torch.Tensor:
        """(kv_heads, chunks, chunk_size) int64: offset of every slot in its chunk, as a layout has it."""
        positions = torch.from_numpy(self.layers[layer].positions).long()
        return positions.view(positions.shape[0], -1, self.config.chunk_size) % self.config.chunk_size

    def plans(self, layer: int) -> list[Plan]:
        """A layer's plans, as they were executed: one for each block of rows that has closed chunks."""
        arrays, tile = self.layers[layer], self.config.tile
        blocks = query_blocks(0, self.length, self.config, tile)
        return [_plan(arrays, block, tile) for block in blocks if block.closed]

    def far_pairs(self) -> int:
        """(query, key) pairs that tiles read from the far field, over layers and choosers."""
        rows = np.minimum(self.config.tile, self.length - self.tile_start)
        pages = sum((np.diff(layer.indptr) @ rows).sum() for layer in self.layers.values())
        return int(pages) * self.config.page_size

    def far_density(self) -> float:
        """Far pairs over causal pairs."""
        choosers = sum(len(layer.indptr) for layer in self.layers.values())
        return self.far_pairs() / (choosers * self.length * (self.length + 1) // 2)


def _plan(arrays: LayerTopology, block: Block, tile: int) -> Plan:
    indptr = torch.from_numpy(arrays.indptr)
    first, last = block.start // tile, (block.stop - 1) // tile + 1
    begin, counts = indptr[:, first:last], indptr[:, first : last + 1].diff(dim=1)
    slot = torch.arange(int(counts.max()))
    used = slot < counts.unsqueeze(-1)  # (choosers, tiles, most)
    entry = (begin.unsqueeze(-1) + slot).clamp_max(max(0, len(arrays.indices) - 1))
    pages, rows = (torch.from_numpy(a).long()[entry] for a in (arrays.indices, arrays.first_row))
    return Plan(block, tile, pages.where(used, -1), rows.where(used, tile), counts)


def layer_topology(
    plans: Sequence[Plan], order: torch.Tensor, group: int, length: int, config: SurgeryConfig
) -> LayerTopology:
    """Block-sparse arrays of one layer, of a text of ``length`` tokens with ``group`` query heads a KV head.

    ``plans`` are over all its rows that have closed chunks, in order, each of whole tiles; ``order`` is the
    layout's, (kv_heads, chunks, chunk_size), of the chunks closed for the last row.
    """
    kv_heads, chunks, size = order.shape
    choosers = kv_heads * (1 if config.tile == 1 else group)
    counts = torch.zeros(choosers, -(-length // config.tile), dtype=torch.int64)
    for plan in plans:
        first = plan.block.start // config.tile
        counts[:, first : first + plan.tiles] = plan.counts
    indptr = torch.zeros(choosers, counts.shape[1] + 1, dtype=torch.int64)
    indptr[:, 1:] = counts.flatten().cumsum(0).view(counts.shape)
    indptr[1:, 0] = indptr[:-1, -1]
    read = [(chooser, plan) for chooser in range(choosers) for plan in plans]
    none = torch.empty(0, dtype=torch.int32)
    indices = [plan.pages[chooser][plan.pages[chooser] >= 0].int() for chooser, plan in read]
    first_row = [plan.first_open[chooser][plan.pages[chooser] >= 0].int() for chooser, plan in read]
    positions = order + torch.arange(chunks)[:, None] * size
    return LayerTopology(
        group=group,
        indptr=indptr.numpy(),
        indices=torch.cat([none, *indices]).numpy(),
        first_row=torch.cat([none, *first_row]).numpy(),
        positions=positions.int().view(kv_heads, chunks * config.pages_per_chunk, config.page_size).numpy(),
    )
