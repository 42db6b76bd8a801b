"""A plan as a boolean matrix: the oracle that every way of executing it is compared with."""

import torch

from llama_surgery.topology.plan import Plan


def page_mask(plan: Plan, pages: int) -> torch.Tensor:
    """Which page every row of the plan's block sees.

    Args:
        plan: A plan over at most ``pages`` pages.
        pages: Closed pages.

    Returns:
        (choosers, rows, pages) bool.
    """
    choosers = plan.pages.shape[0]
    first = torch.full((choosers, plan.tiles, pages + 1), plan.tile, device=plan.pages.device)
    first.scatter_(-1, plan.pages.where(plan.pages >= 0, pages), plan.first_open)
    row = torch.arange(plan.block.start, plan.block.stop, device=plan.pages.device)
    tile = row // plan.tile - plan.block.start // plan.tile
    return first[:, tile, :pages] <= (row % plan.tile)[:, None]


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
