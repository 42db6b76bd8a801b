"""Digits by Gumbel-softmax on hidden states: soft in training, balls when executed.

The executed mask is the trained one: both compare the same digits from the last level up, token by token.
"""

import dataclasses

import torch
from torch.utils.checkpoint import checkpoint

from llama_surgery.gumbel.balls import always_visible, ball_ids
from llama_surgery.gumbel_config import GumbelConfig

#: Rows of a strip in training: logits of a strip are rows × keys × heads.
STRIP = 256


@dataclasses.dataclass
class Drawing:
    """How digits are drawn in a pass of training, and what it left.

    Attributes:
        temperature: Of Gumbel-softmax and soft mask.
        generator: Of the noise, on the CPU; None for no noise.
        balances: Load-balance loss of every layer.
    """

    temperature: float = 1.0
    generator: torch.Generator | None = None
    balances: list[torch.Tensor] = dataclasses.field(default_factory=list)


def gumbel_digits(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """One-hot digits drawn by Gumbel-softmax, hard forwards and soft backwards.

    ``logits`` are (..., arity) float32, as are the digits. The generator is on the CPU, so that a seed means
    the same everywhere; None for no noise.
    """
    if generator is not None:
        uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
        logits = logits - torch.log(-torch.log(uniform)).to(logits.device)
    soft = torch.softmax(logits / temperature, -1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def expected_distance(digits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Levels − Σ_l min_{m ≥ l} M_m with M_m the agreement of level m; equals the distance for one-hot digits.

    Of (..., rows, levels, arity) to (..., keys, levels, arity).
    """
    levels = digits.shape[-2]
    run = total = digits[..., levels - 1, :] @ others[..., levels - 1, :].transpose(-1, -2)
    for level in reversed(range(levels - 1)):
        run = torch.minimum(run, digits[..., level, :] @ others[..., level, :].transpose(-1, -2))
        total = total + run
    return levels - total


def load_balance(logits: torch.Tensor) -> torch.Tensor:
    """Switch-style balance, 1 where children are used evenly: arity · Σ_c share_c · mean probability_c.

    ``logits`` are (batch, heads, n, levels, arity).
    """
    probability = torch.softmax(logits, -1)
    arity = logits.shape[-1]
    share = torch.nn.functional.one_hot(logits.argmax(-1), arity).to(probability.dtype).mean((0, 2))
    return arity * (share * probability.mean((0, 2))).sum(-1).mean()


def balls_of(logits: list[torch.Tensor], config: GumbelConfig) -> torch.Tensor:
    """The ball of every token under the likeliest digits, (batch, heads, n) int64.

    ``logits`` are those of each group of heads, (batch, heads of it, n, levels, arity).
    """
    balls = [ball_ids(part.argmax(-1), part.shape[-1], config.radius_of(part.shape[-2])) for part in logits]
    return torch.cat(balls, 1)


def soft_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    digits: list[torch.Tensor],
    config: GumbelConfig,
    temperature: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a whole window through straight-through masks, in at least float32.

    Args:
        queries: (batch, heads, n, head_dim).
        keys, values: (batch, kv_heads, n, head_dim or value_dim).
        digits: One-hot for each group of heads, (batch, heads of it, n, levels, arity).
        temperature: Of the soft mask.

    Returns:
        (batch, heads, n, value_dim), the queries' dtype; (heads,) int64, pairs that rows see.
    """
    heads, n = queries.shape[1:3]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(heads // keys.shape[1], 1) for x in (keys, values))
    outs, seen = [], torch.zeros(heads, dtype=torch.int64, device=queries.device)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        out, visible = checkpoint(
            _strip,
            queries[:, :, start:stop].to(dtype) * scale,
            keys[:, :, :stop],
            values[:, :, :stop],
            [part[:, :, :stop] for part in digits],
            torch.arange(start, stop, device=queries.device),
            config,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outs.append(out)
        seen = seen + visible
    return torch.cat(outs, 2).to(queries.dtype), seen


def _strip(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    digits: list[torch.Tensor],
    rows: torch.Tensor,
    config: GumbelConfig,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (batch, heads, rows, head_dim) over the keys up to the last of them; pairs that each head sees."""
    heads = queries.shape[1] // len(digits)
    always, causal = always_visible(rows, torch.arange(keys.shape[2], device=keys.device), config.window)
    outs, visible = [], []
    for number, part in enumerate(digits):
        heads_of = slice(number * heads, (number + 1) * heads)
        radius = config.radius_of(part.shape[-2])
        logits = queries[:, heads_of] @ keys[:, heads_of].transpose(-1, -2)
        distance = expected_distance(part[:, :, rows], part)
        hard = always | (causal & (distance <= radius + 0.5))
        soft = torch.sigmoid((radius - distance) / temperature)
        through = torch.where(always, 1.0, hard.to(soft.dtype) + soft - soft.detach())
        weights = torch.softmax(logits.masked_fill(~hard, -torch.inf), -1) * through
        weights = weights / weights.sum(-1, keepdim=True)
        visible.append(hard.sum((0, 2, 3)))
        outs.append(weights @ values[:, heads_of])
    return torch.cat(outs, 1), torch.cat(visible)
