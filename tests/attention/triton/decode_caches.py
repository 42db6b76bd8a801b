"""Caches of decode as an operated layer keeps them, written to by hand."""

import dataclasses

import torch

from llama_surgery.attention.impl.triton.decode.cache import DecodeCache
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.buffers import PageBuffers
from llama_surgery.surgery.decoding import cache_view
from llama_surgery.topology.layout import Layout

#: Of one sequence: its full chunks or None; keys and values (kv_heads, n, dim) behind them.
Sequence = tuple[Layout | None, torch.Tensor, torch.Tensor]


def loaded(config: SurgeryConfig, sequences: list[Sequence], room: int) -> tuple[PageBuffers, DecodeCache]:
    """Buffers with room for ``room`` tokens a sequence, NaN where nothing was written, and their view."""
    config = dataclasses.replace(config, backend="triton")
    _, keys, values = sequences[0]
    kv_heads, streams = len(keys), len(keys) * len(sequences)
    buffers = PageBuffers(config, streams, keys.device)
    buffers.maximum = room
    buffers.reserve(room)
    nothing = (x.new_full((streams, buffers.capacity, x.shape[-1]), torch.nan) for x in (keys, values))
    buffers.write(slice(None), 0, *nothing)
    for made in buffers.read_by_kernels()[2:]:
        if made.is_floating_point():
            made.fill_(torch.nan)
    lengths = []
    for index, (layout, keys, values) in enumerate(sequences):
        own = slice(index * kv_heads, (index + 1) * kv_heads)
        full = 0 if layout is None else layout.keys.shape[1]
        if layout is not None:
            buffers.write_chunks(own, 0, layout)
        buffers.write(own, full, keys, values)
        lengths.append(full + keys.shape[1])
    told = torch.tensor(lengths, dtype=torch.int32, device=keys.device)
    return buffers, cache_view(buffers, config, kv_heads, told)
