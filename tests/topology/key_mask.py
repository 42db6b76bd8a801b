"""A plan by keys in order of position: the oracle that every way of executing it is compared with."""

import torch

from llama_surgery.topology.plan import Plan, page_mask


def key_mask(plan: Plan, order: torch.Tensor, page_size: int) -> torch.Tensor:
    """Which far key every row sees, keys in order of position.

    Args:
        plan: The plan of a block.
        order: (streams, chunks, chunk_size), the layout's order of the closed chunks; choosers are a multiple
            of the streams.
        page_size: Keys of a page.

    Returns:
        (choosers, rows, chunks * chunk_size) bool.
    """
    chunk_size = order.shape[-1]
    pages = order.shape[1] * chunk_size // page_size
    by_slot = page_mask(plan, pages).repeat_interleave(page_size, dim=-1)
    chunk_start = torch.arange(order.shape[1], device=order.device)[:, None] * chunk_size
    position = (order.long() + chunk_start).flatten(1)  # (streams, slots)
    position = position.repeat_interleave(len(by_slot) // len(position), 0)
    return torch.zeros_like(by_slot).scatter_(-1, position[:, None].expand(by_slot.shape), by_slot)
