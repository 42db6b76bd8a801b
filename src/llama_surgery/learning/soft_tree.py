"""The tree over a chunk's keys with digits that are hard forwards and soft backwards."""

import dataclasses

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.layout import Moments
from llama_surgery.topology.tree import principal_direction, tree_order

#: Width of a soft digit, as a share of the spread of the projections in the node.
SOFTNESS = 0.5


@dataclasses.dataclass(frozen=True)
class Pages:
    """Which key is on which page, and the pages' moments. Keys stay in order of position.

    Attributes:
        member: (streams, chunks, chunk_size, pages of a chunk); rows are one-hot in value, and carry the
            gradient of soft digits where the tree is learned.
        moments: Of all pages, chunk by chunk.
    """

    member: torch.Tensor
    moments: Moments


def pages_of(keys: torch.Tensor, mapped: torch.Tensor, config: SurgeryConfig) -> Pages:
    """Pages of full chunks.

    Args:
        keys: (streams, chunks * chunk_size, head_dim), the model's keys.
        mapped: (streams, chunks, chunk_size, head_dim), the keys as the tree sees them; where they carry a
            gradient, membership and moments pass it on.
        config: Geometry.
    """
    size, page = config.chunk_size, config.page_size
    chunked = keys.unflatten(1, (-1, size))
    with torch.no_grad():
        order = tree_order(mapped, page)
        slot = order.argsort(-1)
        member = torch.nn.functional.one_hot(slot // page, size // page).to(chunked.dtype)
    if mapped.requires_grad:
        soft = _soft_membership(mapped, order, page)
        member = member + (soft - soft.detach())
    weights = member.transpose(-1, -2) / page
    mean = weights @ chunked
    variance = (weights @ chunked.square() - mean.square()).clamp_min(0)
    return Pages(member, Moments(mean.flatten(1, 2), variance.flatten(1, 2), page))


def _soft_membership(mapped: torch.Tensor, order: torch.Tensor, page: int) -> torch.Tensor:
    """Probability of every key on every page, if each split were a sigmoid at its node's median.

    Returns:
        (streams, chunks, chunk_size, pages), rows summing to 1.
    """
    size = mapped.shape[-2]
    in_order = mapped.gather(-2, order.unsqueeze(-1).expand(mapped.shape))
    probability = mapped.new_ones(*mapped.shape[:-1], 1)
    nodes = 1
    while size // nodes > page:
        members = in_order.unflatten(-2, (nodes, size // nodes))
        centre = members.mean(-2, keepdim=True)
        centred = members - centre
        direction = principal_direction(centred)  # (streams, chunks, nodes, head_dim)
        own = (centred * direction.unsqueeze(-2)).sum(-1)  # (…, nodes, keys of a node)
        ranked = own.detach().sort(-1).values
        half = own.shape[-1] // 2
        median = (ranked[..., half - 1] + ranked[..., half]) / 2
        width = SOFTNESS * own.detach().std(-1).clamp_min(1e-6)
        across = mapped @ direction.transpose(-1, -2)  # every key on every node's direction
        across = across - (centre.squeeze(-2) * direction).sum(-1).unsqueeze(-2)
        high = torch.sigmoid((across - median.unsqueeze(-2)) / width.unsqueeze(-2))
        probability = torch.stack((probability * (1 - high), probability * high), -1).flatten(-2)
        nodes *= 2
    return probability
