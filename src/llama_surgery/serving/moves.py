"""Copies out of an engine's cache and into it, 16 bytes at a time where that divides its rows.

Index operations take equally long for an element of 2 bytes and for one of 16.
"""

import torch


def take(held: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(n, kv_heads, …) of a cache (blocks, kv_heads, …), contiguous; ``blocks`` (n,) int64."""
    heads = torch.arange(held.shape[1], device=held.device)
    return _wide(held)[blocks[:, None], heads].view(held.dtype).contiguous()


def take_rows(held: torch.Tensor, blocks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(kv_heads, n, dim) of a cache (blocks, kv_heads, chunk_size, dim), at blocks and rows (n,) int64."""
    return _wide(held)[blocks, :, rows].view(held.dtype).transpose(0, 1)


def put(held: torch.Tensor, blocks: torch.Tensor, states: torch.Tensor) -> None:
    """Write (n, kv_heads, …), of any dtype, into a cache (blocks, kv_heads, …)."""
    states = states.to(held.dtype)
    wide = _wide(held), _wide(states)
    if wide[0].dtype == wide[1].dtype:
        held, states = wide
    held[blocks] = states


def in_a_row(held: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, kv_heads, rows, …) of one sequence as (kv_heads, n * rows, …), contiguous."""
    return _wide(held).transpose(0, 1)[:, blocks].view(held.dtype).flatten(1, 2)


def _wide(states: torch.Tensor) -> torch.Tensor:
    """The same memory as complex numbers of 16 bytes; unchanged where they do not fit."""
    numbers = states.shape[-1], states.storage_offset(), *states.stride()[:-1]
    fits = states.stride(-1) == 1 and not any(n * states.element_size() % 16 for n in numbers)
    return states.view(torch.complex128) if fits else states
