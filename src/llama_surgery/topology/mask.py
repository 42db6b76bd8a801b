"""A plan as a boolean matrix."""

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
