"""Clustered queries, keys and values, whose pages differ as those of text do; and what must come out."""

import torch

#: Clusters, how far their centres are apart, and tokens for which keys and queries stay in one.
CLUSTERS, APART, KEYS_STAY, QUERIES_STAY = 64, 0.65, 24, 64


def clustered_states(
    kv_heads: int,
    group: int,
    length: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (kv_heads, group, length, dim), keys and values (kv_heads, length, dim) of one layer."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(kv_heads, CLUSTERS, dim, device=device, generator=generator) * APART

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dim, device=device, generator=generator, dtype=dtype)

    def walk(stay: int) -> torch.Tensor:
        count = -(-length // stay)
        topic = torch.randint(CLUSTERS, (kv_heads, count), device=device, generator=generator)
        topic = topic.repeat_interleave(stay, 1)[:, :length, None].expand(-1, -1, dim)
        return centres.gather(1, topic).to(dtype)

    keys = normal(kv_heads, length) + walk(KEYS_STAY)
    queries = normal(kv_heads, group, length) + walk(QUERIES_STAY)[:, None]
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
