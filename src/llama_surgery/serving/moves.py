"""Views of an engine's caches, and copies out of them and into them, 16 bytes at a time where rows allow it.

Index operations take equally long for an element of 2 bytes and for one of 16.
"""

import torch


def take(held: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(n, kv_heads, …) of a cache (blocks, kv_heads, …), contiguous; ``blocks`` (n,) int64."""
    heads = torch.arange(held.shape[1], device=held.device)
    return _wide(held)[blocks[:, None], heads].view(held.dtype).contiguous()


def take_rows(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kv_heads, n, dim) of caches (blocks, kv_heads, chunk_size, dim), at blocks and rows (n,) int64."""
    dim, apart = keys.shape[-1], values.data_ptr() - keys.data_ptr()
    side_by_side = apart == dim * keys.element_size() and keys.stride(-1) == 1
    alike = keys.shape == values.shape and keys.stride() == values.stride()
    held = [keys, values]
    if side_by_side and alike:  # one copy takes less time to launch than two
        held = [keys.as_strided((*keys.shape[:-1], 2 * dim), keys.stride())]
    found = [_wide(states)[blocks, :, rows].view(states.dtype).transpose(0, 1) for states in held]
    return tuple(found) if len(found) == 2 else found[0].chunk(2, -1)  # type: ignore[return-value]


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


def slots(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Caches (blocks, kv_heads, chunk_size, head_dim) as (kv_heads, slots, head_dim), and from one block's
    first slot to the next one's; None where such views cannot be."""
    found = []
    for held in (keys, values):
        blocks, heads, size, dim = held.shape
        block, head, row, channel = held.stride()
        if channel != 1 or block % row:
            return None
        shape = heads, (blocks - 1) * (block // row) + size, dim
        found.append((held.as_strided(shape, (head, row, 1)), block // row))
    (keys, apart), (values, also) = found
    return (keys, values, apart) if apart == also else None


def _wide(states: torch.Tensor) -> torch.Tensor:
    """The same memory as complex numbers of 16 bytes; unchanged where they do not fit."""
    numbers = states.shape[-1], states.storage_offset(), *states.stride()[:-1]
    fits = states.stride(-1) == 1 and not any(n * states.element_size() % 16 for n in numbers)
    return states.view(torch.complex128) if fits else states
