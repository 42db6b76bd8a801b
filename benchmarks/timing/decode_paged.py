"""A benchmark's cache as an engine would keep it: shuffled blocks, the engine's strides, a block table."""

import dataclasses

import torch

from llama_surgery.attention.impl.triton.decode.launch import DecodeResult, decode
from llama_surgery.errors import SurgeryError
from llama_surgery.serving.paged import PagedStates, side_bytes
from llama_surgery.serving.paged_kernels import kernel_view

from .decode_case import Layer, Setting


def block_tables(setting: Setting, device: torch.device) -> torch.Tensor:
    """(sequences, chunks) int32: blocks of all chunks, shuffled; block 0 is nobody's."""
    size = setting.config.chunk_size
    chunks = [-(-length // size) for length in setting.lengths]
    numbers = torch.randperm(sum(chunks), generator=torch.Generator().manual_seed(0)) + 1
    tables = torch.zeros(setting.batch, max(chunks), dtype=torch.int32)
    for sequence, own in enumerate(numbers.split(chunks)):
        tables[sequence, : len(own)] = own
    return tables.to(device)


def paged(layer: Layer, tables: torch.Tensor) -> Layer:
    """The layer with its chunks in an engine's blocks, its own cache left as it is.

    Args:
        layer: With a contiguous cache.
        tables: From :func:`block_tables`; the same tensor for all layers, as an engine has it.
    """
    cache, size = layer.cache, layer.cache.config.chunk_size
    device, heads, dim = cache.keys.device, cache.kv_heads, cache.keys.shape[-1]
    count = int(tables.max()) + 1
    states = torch.empty(count, size, heads, 2 * dim, dtype=cache.keys.dtype, device=device).transpose(1, 2)
    width = side_bytes(cache.config, dim, cache.keys.dtype) // 4
    side = torch.empty(count, heads, width, device=device)
    engine = PagedStates(states[..., :dim], states[..., dim:], side, cache.config, kernels=True)
    for sequence, blocks in enumerate(tables):
        own = blocks[blocks > 0].long()
        for target, source in (
            (engine.keys, cache.keys),
            (engine.values, cache.values),
            (engine.scores, cache.features),
            (engine.mean_values, cache.mean_values),
        ):
            target[own] = source[sequence, :, : len(own)].transpose(0, 1)
        engine.first_pages[own] = cache.sink_page[sequence, :, 0]
    return dataclasses.replace(layer, cache=kernel_view(engine, tables, cache.lengths))


def same(setting: Setting, layers: list[Layer], scattered: list[Layer]) -> None:
    """Check that both kinds of cache give the same numbers.

    Raises:
        SurgeryError: They do not.
    """
    for one, other in zip(layers, scattered, strict=True):
        results: list[DecodeResult] = [decode(x.queries, x.cache) for x in (one, other)]
        for name in ("out", "lse", "opened", "read"):
            if not torch.equal(getattr(results[0], name), getattr(results[1], name)):
                raise SurgeryError(f"{setting}: {name} of the paged cache differs from the contiguous one's.")
