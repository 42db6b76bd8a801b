"""What operated layers read, through the engine's logging."""

import time

from vllm import envs
from vllm.logger import init_logger

from llama_surgery.serving.counting import LayerCounters
from llama_surgery.surgery.statistics import summarise

logger = init_logger("vllm.llama_surgery")

_layers: dict[int, LayerCounters] = {}
_last = time.monotonic()


def register(index: int, counters: LayerCounters) -> None:
    """Let :func:`report` speak of layer ``index`` too."""
    _layers[index] = counters


def report() -> None:
    """Log one line about all layers, at the engine's own interval and only if there is anything to say."""
    global _last
    now = time.monotonic()
    counted = {index: layer for index, layer in _layers.items() if layer.by_tile}
    if not counted or now - _last < envs.VLLM_LOG_STATS_INTERVAL:
        return
    _last = now
    page_size = next(iter(counted.values())).config.page_size
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
