"""Synthetic states: near field and first token carry what they do in real models."""

import math

import pytest
import torch
from benchmarks.timing.states import clustered_states

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks


@pytest.mark.parametrize("length", [4096, 8192])
def test_near_field_and_first_token_hold_most_of_a_rows_attention(length: int) -> None:
    config, dim = SurgeryConfig(), 128
    queries, keys, _ = clustered_states(1, 2, length, dim, torch.device("cpu"), torch.float32)
    rows = torch.arange(length // 4, length, 97)
    logits = queries[0, :, rows] @ keys[0].T * dim**-0.5
    key = torch.arange(length)
    logits = logits.masked_fill(key > rows[:, None], -math.inf)
    first = torch.tensor([closed_chunks(row, config, config.tile) for row in rows.tolist()])
    near = key >= first[:, None] * config.chunk_size
    known = logits.masked_fill(~near & (key > 0), -math.inf).logsumexp(-1)
    assert 0.1 < (logits.logsumexp(-1) - known).mean() < 0.3
    weights = logits.softmax(-1)
    assert weights[..., 0].mean() > 0.2 and (weights * near).sum(-1).mean() > 0.3
