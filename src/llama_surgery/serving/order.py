"""Which full blocks of an engine's cache are in tree order: they are sorted when their pages are read."""

from collections.abc import Callable

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.serving.paged import Scheduled


class BlockOrder:
    """Remembers on the device which full blocks still lie in order of position.

    Args:
        size: Tokens of a block.
        count: How many blocks there are, asked once the engine has allocated them.
        device: Where the caches are.
    """

    def __init__(self, size: int, count: Callable[[], int], device: torch.device) -> None:
        self._size, self._count, self._device = size, count, device
        self._unsorted: torch.Tensor | None = None  # (blocks,) bool

    def note_steps(self, lengths: torch.Tensor, tables: torch.Tensor) -> None:
        """Remember the blocks that a step of one row a sequence fills.

        Args:
            lengths: (sequences,) tokens after the step, on the host; 0 for what only pads the batch.
            tables: (sequences, chunks) int32, blocks of every chunk.
        """
        full = ((lengths > 0) & (lengths % self._size == 0)).nonzero()[:, 0]
        if len(full):
            chunks = (lengths[full] // self._size - 1).to(self._device, non_blocking=True)
            rows = full.to(self._device, non_blocking=True)
            self._mark(tables[rows, chunks].long(), unsorted=True)

    def due(self, sequences: list[Scheduled], config: SurgeryConfig) -> torch.Tensor:
        """(n,) int64: blocks that are read sparsely in this step and are not in tree order yet. They count as
        sorted from now on; what else the step fills as unsorted."""
        each = [(s, s.start // self._size, s.far_chunks(config)) for s in sequences]
        first = [min(begin, far) for _, begin, far in each]
        now = [s.blocks[begin:far] for s, begin, far in each]
        later = [s.blocks[max(begin, far) : s.stop // self._size] for s, begin, far in each]
        self._mark(torch.cat(later), unsorted=True)
        self._mark(torch.cat(now), unsorted=False)
        if not any(first):
            return torch.cat(now)
        earlier = torch.cat([s.blocks[:count] for s, count in zip(sequences, first, strict=True)])
        return torch.cat((*now, self.take(earlier)))

    def take(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of blocks (n,) int64 the full ones that are not in tree order: they count as sorted from now on."""
        if self._unsorted is None:
            return blocks[:0]
        read = torch.zeros_like(self._unsorted).index_fill_(0, blocks, True)
        left = (read & self._unsorted).nonzero()[:, 0]  # waits for the device
        self._mark(left, unsorted=False)
        return left

    def _mark(self, blocks: torch.Tensor, *, unsorted: bool) -> None:
        if self._unsorted is None:
            self._unsorted = torch.zeros(self._count(), dtype=torch.bool, device=self._device)
        self._unsorted.index_fill_(0, blocks, unsorted)
