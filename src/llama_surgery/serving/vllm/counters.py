"""What operated layers read, through the engine's logging."""

import time

from vllm import envs
from vllm.logger import init_logger

from llama_surgery.attention.api import AttentionResult
from llama_surgery.surgery.statistics import Counters, summarise

logger = init_logger("vllm.llama_surgery")

_layers: dict[int, "LayerCounters"] = {}
_last = time.monotonic()


class LayerCounters:
    """Counts of one layer since the last report.

    Args:
        index: Of the layer.
        page_size: Keys of a page.
        quiet: Count nothing: another tensor rank of this server reports.
    """

    def __init__(self, index: int, page_size: int, quiet: bool) -> None:
        self.page_size, self.quiet = page_size, quiet
        self.reset()
        _layers[index] = self

    def reset(self) -> None:
        self.by_tile: dict[int, Counters] = {}
        self.dense_rows = 0

    def add(self, tile: int, result: AttentionResult, kv_heads: int) -> None:
        """Count one call of rows in tiles of ``tile``."""
        if self.quiet:
            return
        self.by_tile.setdefault(tile, Counters()).add(result, kv_heads, self.page_size)
        sparse = sum(plan.block.stop - plan.block.start for plan in result.plans)  # type: ignore[attr-defined]
        self.dense_rows += result.out.shape[2] - sparse


def report() -> None:
    """Log one line about all layers, at the engine's own interval and only if there is anything to say."""
    global _last
    now = time.monotonic()
    counted = {index: layer for index, layer in _layers.items() if layer.by_tile}
    if not counted or now - _last < envs.VLLM_LOG_STATS_INTERVAL:
        return
    _last = now
    page_size = next(iter(counted.values())).page_size
    read = summarise({index: layer.by_tile for index, layer in counted.items()}, page_size)
    dense = sum(layer.dense_rows for layer in counted.values())
    for layer in counted.values():
        layer.reset()
    logger.info(
        "llama-surgery: rows %d, far density %.4f, total density %.4f, pages read %d, dense fallbacks %.1f%% "
        "of rows (no closed chunk yet)",
        read.rows // len(counted),
        read.far_density,
        read.total_density,
        read.pages_read,
        100 * dense / max(1, read.rows),
    )
