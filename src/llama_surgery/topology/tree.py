"""The balanced tree over a chunk's keys: splits along directions of the keys' own spread.

A key's path is its leaf in a binary tree of depth L. Paths are balanced by construction:
every split sends half of the keys to each child. The distance of two keys is L minus the number of
leading digits they share, an ultrametric; all keys that share a prefix form a ball.
"""

import math

import torch

#: Steps of the power iteration. A direction only has to separate the keys, not to be exact. The number is a
#: choice; others have not been measured.
POWER_STEPS = 8


def principal_direction(centred: torch.Tensor) -> torch.Tensor:
    """Direction of the largest spread, by power iteration from a fixed start: (..., head_dim) unit vectors.

    The start is the covariance's column of the channel that varies most: deterministic, and never
    orthogonal to the answer unless the keys do not vary at all. A fixed number of steps keeps it free of
    host synchronisation. ``centred`` is (..., keys, head_dim) with mean zero over keys, float32 or float64;
    where all keys are equal the vector is zero.
    """
    covariance = centred.transpose(-1, -2) @ centred
    widest = covariance.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    direction = covariance.gather(
        -1, widest[..., None].expand(*covariance.shape[:-1], 1)
    )  # (..., head_dim, 1)
    tiny = torch.finfo(covariance.dtype).tiny
    for _ in range(POWER_STEPS):
        direction = direction / direction.norm(dim=-2, keepdim=True).clamp_min(tiny)
        direction = covariance @ direction
    direction = direction / direction.norm(dim=-2, keepdim=True).clamp_min(tiny)
    return direction.squeeze(-1)


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of each group: states (..., rows, dim) and index (..., k) int64 to (..., k, dim).

    Whole rows at a time, where ``gather`` takes every number by itself: several times faster on a CPU.
    """
    *lead, rows, dim = states.shape
    first = torch.arange(math.prod(lead), device=states.device).mul_(rows).view(*lead, 1)
    return states.reshape(-1, dim).index_select(0, (index + first).flatten()).view(*index.shape, dim)


def tree_order(keys: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tree order of each chunk: original offsets in the order of paths, ties by position.

    Args:
        keys: (..., chunk_size, head_dim), any floating dtype; computed in float32, or float64 if given.
        page_size: Keys of a leaf; ``chunk_size`` is it times a power of two.

    Returns:
        (..., chunk_size) int64: slot s of the reordered chunk holds the key of offset ``order[..., s]``.
        Every ball is a contiguous run of slots; inside a page offsets ascend.
    """
    size = keys.shape[-2]
    lead = keys.shape[:-2]
    order = torch.arange(size, device=keys.device).expand(*lead, size)
    keys = keys if keys.dtype == torch.float64 else keys.float()
    nodes, order = keys.unsqueeze(-3), order.unsqueeze(-2)  # (..., nodes, keys of a node, …)
    while nodes.shape[-2] > page_size:
        centred = nodes - nodes.mean(-2, keepdim=True)
        projection = (centred @ principal_direction(centred).unsqueeze(-1)).squeeze(-1)
        # A stable sort of nodes kept in order of position breaks ties by position.
        child_size = nodes.shape[-2] // 2
        split = projection.argsort(dim=-1, stable=True)
        split = split.unflatten(-1, (2, child_size)).sort(dim=-1).values.flatten(-2)
        nodes = take(nodes, split)
        order = order.gather(-1, split)
        shape = (*lead, nodes.shape[-3] * 2, child_size)
        nodes, order = nodes.reshape(*shape, keys.shape[-1]), order.reshape(shape)
    return order.reshape(*lead, size)


def paths(order: torch.Tensor, page_size: int) -> torch.Tensor:
    """Digits of every key by original offset, 0 or 1, the most significant first.

    Of ``order`` (..., chunk_size) int64, from :func:`tree_order`: (..., chunk_size, depth) int64.
    """
    size = order.shape[-1]
    leaf = torch.empty_like(order).scatter_(
        -1, order, (torch.arange(size, device=order.device) // page_size).expand_as(order)
    )
    digits, leaves = [], size // page_size
    while leaves > 1:
        leaves //= 2
        digits.append(leaf // leaves % 2)
    return torch.stack(digits, -1) if digits else leaf.new_empty(*leaf.shape, 0)


def distances(digits: torch.Tensor) -> torch.Tensor:
    """Ultrametric distance of every two keys, depth minus the leading digits they share: int64 in 0 … depth.

    From ``digits`` (..., keys, depth) int64 to (..., keys, keys).
    """
    agree = (digits.unsqueeze(-2) == digits.unsqueeze(-3)).cumprod(-1)
    return digits.shape[-1] - agree.sum(-1)
