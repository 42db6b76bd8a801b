"""What choosing pages may cost: a form above these ceilings is a result of research, not a default."""

import pytest
import torch
from tests.surgery.tiny import build

from llama_surgery import SurgeryConfig
from llama_surgery.learning.forecast import at_length, shape_of
from llama_surgery.surgery.buffers import PageBuffers

#: Of the bytes of keys and values; of dense attention's multiply-adds at 128k; of a matrix tile's rows.
BYTES, MULTIPLY_ADDS, PADDING = 0.05, 0.035, 0.15
LENGTH = 131_072


def test_features_and_summaries_are_small_beside_keys_and_values() -> None:
    """Of the buffers that kernels read, which the forecast knows."""
    config = SurgeryConfig()
    states = torch.zeros(2, 2 * config.chunk_size, 64, dtype=torch.bfloat16)
    buffers = PageBuffers(config, 2, states.device)
    buffers.reserve(states.shape[1])
    buffers.write(slice(None), 0, states, states)
    keys, values, features, _, mean_values = (part.nbytes for part in buffers.read_by_kernels())
    assert (features + mean_values) / (keys + values) <= BYTES
    text = at_length(shape_of(build("Llama")), config, 0.06, LENGTH)
    assert text.feature_bytes / text.cache_bytes == (features + mean_values) / (keys + values)


def test_what_choosing_pages_multiplies_is_known() -> None:
    """The default misses the ceiling, by means of values and variances of every channel (docs/log.md)."""
    text = at_length(shape_of(build("Llama")), SurgeryConfig(), 0.06, LENGTH)
    assert MULTIPLY_ADDS < text.scoring + text.summary <= 0.0505


@pytest.mark.parametrize("group", range(1, 9))
def test_a_tile_of_every_group_size_is_hardly_padded(group: int) -> None:
    pytest.importorskip("triton")
    from llama_surgery.attention.call import AttentionCall
    from llama_surgery.attention.impl.triton.job import make_job
    from llama_surgery.attention.impl.triton.launch import heads_of_tile
    from llama_surgery.attention.impl.triton.select.launch import Shape

    config = SurgeryConfig()
    keys = torch.zeros(2, 1024, 64)
    call = AttentionCall(config, "triton", config.tile, 1.0)
    job = make_job(call, torch.zeros(2, group, 1024, 64), keys, keys, None, start=0)
    choosers, heads = job.queries.shape[:2]
    real = choosers * heads * 1024
    shape = Shape.of(job, job.whole())
    scored = choosers * shape.blocks * shape.rows
    block = heads_of_tile(heads, job.tuning.rows, config.tile)
    attended = choosers * -(-heads // block) * block * 1024
    assert max(scored, attended) / real - 1 <= PADDING
