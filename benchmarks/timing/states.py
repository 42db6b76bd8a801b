"""Clustered queries, keys and values, whose pages differ as those of text do; and what must come out."""

import math

import torch

#: Clusters, how far their centres are apart, and tokens for which keys and queries stay in one.
CLUSTERS, APART, KEYS_STAY, QUERIES_STAY = 64, 0.65, 24, 64
#: How strongly recent keys and the first token pull queries: constants that give the shares named below.
#: Tokens after which keys turn to a new direction, tokens that are recent, length of the first key in √dim.
NEAR, SINK, TURN, RECENT, LONG = 24.0, 0.4, 512, 256, 3.0


def clustered_states(
    kv_heads: int,
    group: int,
    length: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (kv_heads, group, length, dim), keys and values (kv_heads, length, dim) of one layer.

    Keys and queries walk through clusters. As in real models most attention goes to recent keys, which share
    a slowly turning direction with the queries, and to the first token, whose key is alone in channel 0. Both
    pull by the logarithm of the position, so that shares are the same at all lengths: with 128 channels the
    near field of the defaults and the first page are 0.20 nats under a row's total at 8,192 tokens, 0.21 at
    32,768. Kernels cost by it: pages that might be opened by the
    total so far are scored again in the end.
    """
    generator = torch.Generator(device).manual_seed(seed)
    scale = dim**-0.5

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dim, device=device, generator=generator, dtype=dtype)

    centres = normal(kv_heads, CLUSTERS, dtype=torch.float32) * APART

    def walk(stay: int) -> torch.Tensor:
        count = -(-length // stay)
        topic = torch.randint(CLUSTERS, (kv_heads, count), device=device, generator=generator)
        topic = topic.repeat_interleave(stay, 1)[:, :length, None].expand(-1, -1, dim)
        return centres.gather(1, topic).to(dtype)

    position = torch.arange(length, device=device)
    place, turned = position // TURN, (position % TURN / TURN)[:, None]
    corner = torch.nn.functional.normalize(normal(kv_heads, length // TURN + 2, dtype=torch.float32), dim=-1)
    recent = torch.nn.functional.normalize(corner[:, place].lerp(corner[:, place + 1], turned), dim=-1)
    keys = normal(kv_heads, length) + walk(KEYS_STAY) + (recent * dim**0.5).to(dtype)
    queries = normal(kv_heads, group, length) + walk(QUERIES_STAY)[:, None]
    pull = (NEAR * (position + 1) / RECENT).log().clamp_min(0)[:, None]
    queries += (recent * pull).to(dtype)[:, None]
    keys[..., 0] = 0
    some = queries[:, 0, torch.randint(length, (256,), device=device, generator=generator)].float()
    level = (some @ keys.float().transpose(1, 2) * scale).logsumexp(-1).mean() - math.log(length)
    keys[:, 0] = 0
    keys[:, 0, 0] = LONG * dim**0.5
    queries[..., 0] = ((level + (SINK * (position + 1)).log()) / LONG).to(dtype)
    return queries, keys, normal(kv_heads, length)


def plain_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    logits: torch.Tensor,
    means: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention of one stream's rows to keys, and to means that stand in for others.

    Args:
        queries: (heads, rows, dim).
        keys, values: (n, dim).
        visible: (rows, n) bool.
        logits: (heads, rows, pages) of the means, -inf where a row sees the page itself.
        means: (pages, dim).
        scale: Of q·k.
        dtype: float64, or what weights and values are rounded to.

    Returns:
        (heads, rows, dim) float64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    products = (queries.to(wide) @ keys.to(wide).T * scale).masked_fill(~visible, -torch.inf)
    weights = torch.cat((products, logits.to(wide)), -1).softmax(-1).to(dtype)
    return (weights @ torch.cat((values, means)).to(dtype)).double()
