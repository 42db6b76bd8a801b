"""From which position on an operated model is faster than the dense one where it runs: ``dense_until``."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.context import context_length
from llama_surgery.surgery.operation import operation_of, reset_statistics
from llama_surgery.surgery.progress import Progress, counted

#: Tokens of the shortest and of the longest prompt that is timed.
SHORTEST, LONGEST = 2048, 131072
#: Times a prompt is read by each side, after once more that does not count.
READINGS = 3
#: No longer prompt is begun after so many seconds.
SECONDS = 30.0
#: ``dense_until`` on a CPU, where timing whole prompts would take many minutes: up to so many tokens dense
#: attention was about as fast with the defaults, on random states (docs/performance.md).
ON_CPU = 4096
#: ``dense_until`` is a multiple of so many tokens: times are not known more finely.
UNIT = 1024


def usual_dense_until(model: PreTrainedModel, ids: torch.Tensor, progress: Progress | None = None) -> int:
    """``dense_until`` as ``operate()`` sets it: :data:`ON_CPU`, at most the model's context; timed elsewhere.

    Arguments as :func:`measured_dense_until` takes them.
    """
    if model.device.type != "cpu":
        return measured_dense_until(model, ids, progress=progress)
    tile = operation_of(model).config.tile
    return -(-min(ON_CPU, context_length(model) or ON_CPU) // tile) * tile


def measured_dense_until(
    model: PreTrainedModel,
    ids: torch.Tensor,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> int:
    """Time whole prompts of rising length, all rows dense and as few as may be, until sparse is faster.

    Args:
        model: An operated model with its thresholds, on the device that it will run on.
        ids: (windows, length) int64, text like what it will read. Longer prompts are windows in a row.
        clock: Seconds.
        progress: As ``operate()`` takes it.

    Returns:
        The position from which on a prompt is read faster sparse than dense, between the lengths timed; the
        longest there could be, where it was not faster at any that was timed. A multiple of the tile.
    """
    operation = operation_of(model)
    config = operation.config
    most = min(LONGEST, context_length(model) or LONGEST)
    tokens = ids.flatten().repeat(-(-most // ids.numel())).to(model.device)
    sparse = dataclasses.replace(config, dense_until=0)
    dense = dataclasses.replace(config, dense_until=-(-most // config.tile) * config.tile)
    times: list[tuple[int, float, float]] = []
    began, lengths = clock(), _lengths(most)
    try:
        with counted(model, "timing prompts", 2 * (1 + READINGS) * len(lengths), progress):
            for length in lengths:
                if times and clock() - began > SECONDS:
                    break
                row = tokens[None, :length]
                each = [_seconds(model, row, c, clock) for c in (dense, sparse)]
                times.append((length, each[0], each[1]))
                if each[1] <= each[0]:
                    break
    except torch.OutOfMemoryError:
        pass  # so long a prompt cannot be read at all
    finally:
        operation.use(config)
        reset_statistics(model)
    return crossing(times, config, most)


def crossing(times: Sequence[tuple[int, float, float]], config: SurgeryConfig, most: int) -> int:
    """``dense_until`` for (tokens, seconds dense, seconds sparse) of rising lengths.

    Where the line through what sparse costs more at the last two lengths crosses zero, rounded up; 0 where
    already the first is no slower sparse, ``most``, what the longest prompt has, where the last still is.
    """
    if all(sparse <= dense for _, dense, sparse in times):
        return 0
    found = most
    length, dense, sparse = times[-1]
    if sparse <= dense:
        before, old_dense, old_sparse = times[-2]
        loss, gain = old_sparse - old_dense, dense - sparse
        found = round(before + (length - before) * loss / max(loss + gain, 1e-12))
    unit = UNIT if UNIT % config.tile == 0 else config.tile
    return -(-found // unit) * unit


def _lengths(most: int) -> list[int]:
    lengths, length = [], min(SHORTEST, most)
    while length < most:
        lengths.append(length)
        length *= 2
    return [*lengths, most]


@torch.inference_mode()
def _seconds(
    model: PreTrainedModel, row: torch.Tensor, config: SurgeryConfig, clock: Callable[[], float]
) -> float:
    """Median time of a prompt (1, n) until the first token is known."""
    operation_of(model).use(config)
    taken = []
    for _ in range(1 + READINGS):
        began = clock()
        model(row, use_cache=True, logits_to_keep=1)
        if row.is_cuda:
            torch.cuda.synchronize(row.device)
        taken.append(clock() - began)
    return statistics.median(taken[1:])
