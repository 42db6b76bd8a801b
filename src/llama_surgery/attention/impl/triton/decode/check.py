"""What the kernels of decode take for granted: they read at addresses, and would misread anything else."""

from typing import TYPE_CHECKING

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.topology.router import PageRouter

if TYPE_CHECKING:
    from llama_surgery.attention.impl.triton.decode.cache import DecodeCache


def expect(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise SurgeryError where a tensor has another shape, dtype or device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise SurgeryError(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: expected {tuple(shape)} "
            f"{dtype} on {device}."
        )


def check_cache(cache: "DecodeCache") -> None:
    """Raise SurgeryError where tensors do not fit together, or lie otherwise than the kernels read them."""
    config, keys = cache.config, cache.keys
    if keys.dim() != 5 or cache.lengths.dim() != 1:
        raise SurgeryError(
            f"keys {tuple(keys.shape)}, lengths {tuple(cache.lengths.shape)}: expected (sequences, kv_heads, "
            "blocks, chunk_size, head_dim) and (sequences,)."
        )
    *outer, dim = keys.shape
    outer = [cache.lengths.shape[0], *outer[1:3]]
    pages, like = config.pages_per_chunk, (keys.dtype, keys.device)
    expect("keys", keys, (*outer, config.chunk_size, dim), *like)
    expect("values", cache.values, (*outer, config.chunk_size, cache.values.shape[-1]), *like)
    expect("lengths", cache.lengths, (outer[0],), torch.int32, keys.device)
    rows = [keys, cache.values]
    if cache.features is not None:
        expect("features", cache.features, (*outer, pages, 2 * dim), *like)
        if cache.sink_page is None:
            raise SurgeryError("features of pages, but no sink_page: pass both, or neither.")
        first = (*outer[:2], cache.sink_page.shape[-1])
        expect("sink_page", cache.sink_page, first, torch.int32, keys.device)
        rows.append(cache.features)
    if cache.table is not None:
        expect("table", cache.table, (outer[0], cache.table.shape[-1]), torch.int32, keys.device)
        rows.append(cache.table)
    if cache.mean_values is not None:
        width = cache.values.shape[-1]
        expect("mean_values", cache.mean_values, (*outer, pages, width), *like)
        rows.append(cache.mean_values)
    if any(tensor.stride(-1) != 1 and tensor.shape[-1] > 1 for tensor in rows):
        raise SurgeryError("keys, values, what is known of them and the table: the last stride must be 1.")
    if cache.whole is not None:
        expect("whole", cache.whole, (outer[0],), torch.int32, keys.device)
    for name, each in (("lengths", cache.lengths), ("whole", cache.whole)):
        if each is not None and not each.is_contiguous():
            raise SurgeryError(f"{name} must be contiguous.")


def check_tokens(cache: "DecodeCache", keys: torch.Tensor, values: torch.Tensor, longest: int | None) -> None:
    """
    Args:
        longest: Settled tokens of the longest sequence, where the host knows it.

    Raises:
        SurgeryError: New tokens that do not fit the cache, or for which it has no room.
    """
    new = keys.shape[1] if keys.dim() == 3 else 0
    for name, given, held in (("keys", keys, cache.keys), ("values", values, cache.values)):
        expect(f"new {name}", given, (cache.streams, new, held.shape[-1]), held.dtype, held.device)
    if longest is None:
        # Lengths on a GPU are not asked for. Rows without room are NaN in what decode() returns.
        longest = int(cache.lengths.max()) if cache.lengths.device.type == "cpu" and new else 0
    if longest + new > cache.capacity:
        raise SurgeryError(
            f"{new} new tokens behind {longest} for a cache of {cache.capacity} tokens a sequence: make a "
            "larger one."
        )


def check_call(
    queries: torch.Tensor,
    cache: "DecodeCache",
    sink_logit: torch.Tensor | None,
    router: PageRouter,
    tally: torch.Tensor | None,
) -> None:
    """Raise SurgeryError where what goes with the queries does not fit them or the cache."""
    if queries.dim() != 4 or (queries.shape[0], queries.shape[3]) != (cache.streams, cache.keys.shape[-1]):
        raise SurgeryError(
            f"queries {tuple(queries.shape)} do not fit cached keys {tuple(cache.keys.shape)}: expected "
            "(streams, heads, rows, head_dim)."
        )
    if queries.dtype != cache.keys.dtype or queries.device != cache.keys.device:
        raise SurgeryError(
            f"queries are {queries.dtype} on {queries.device}, cached keys {cache.keys.dtype} on "
            f"{cache.keys.device}: the triton kernels cannot run this."
        )
    if sink_logit is not None and (sink_logit.shape, sink_logit.device) != (
        queries.shape[:2],
        queries.device,
    ):
        raise SurgeryError(
            f"sink_logit {tuple(sink_logit.shape)} on {sink_logit.device}: expected (streams, heads) = "
            f"{tuple(queries.shape[:2])} on {queries.device}."
        )
    if tally is not None:
        expect("tally", tally, (2, cache.kv_heads), torch.int64, queries.device)
        if not tally.is_contiguous():
            raise SurgeryError("tally must be contiguous.")
    heads, dim = queries.shape[1], queries.shape[3]
    for name, part in router.tensors().items():
        if name in ("key_weight", "key_map"):
            continue  # chunks are ordered by it when they are laid out
        wide = (dim,) if name.endswith("weight") else ()
        expect(f"router {name}", part, (cache.kv_heads, heads, *wide), torch.float32, queries.device)
