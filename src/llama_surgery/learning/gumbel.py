"""The ``gumbel`` topology: digits by Gumbel-softmax on hidden states, soft in training, balls when executed.

The executed mask is the trained one: both compare the same digits from the last level up, token by token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llama_surgery.attention.balls import BallBackend
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.supported import attention_modules, inner_model
from llama_surgery.topology.balls import always_visible, ball_ids
from llama_surgery.topology.router import ContentRouter

#: Rows of a strip in training: logits of a strip are rows × keys × heads.
STRIP = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class GumbelSettings:
    """Training of content routers.

    Attributes:
        length: Tokens of a training window.
        steps: Steps, each on one window.
        arities: Children of a node, one for each group of heads.
        radius: Largest visible distance; half the levels of each group if None.
        window: Tokens that are always visible, the row's own counted.
        rate: Adam's learning rate.
        balance: Weight of the load balance at the end of its ramp.
        first_temperature: Of Gumbel-softmax and soft mask at the start.
        last_temperature: At the end; geometric in between.
        seed: Of routers and noise.

    Raises:
        SurgeryError: A value is out of range.
    """

    length: int = 8192
    steps: int = 300
    arities: tuple[int, ...] = (2,)
    radius: int | None = None
    window: int = 128
    rate: float = 1e-3
    balance: float = 1.0
    first_temperature: float = 1.0
    last_temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "arities", tuple(self.arities))
        for name, low in (("length", 2), ("steps", 1), ("window", 1)):
            if getattr(self, name) < low:
                raise SurgeryError(f"{name}={getattr(self, name)}: must be at least {low}.")
        if self.radius is not None and self.radius < 0:
            raise SurgeryError(f"radius={self.radius}: must be at least 0, or None for half the levels.")
        if not 0 < self.last_temperature <= self.first_temperature:
            raise SurgeryError(
                f"first_temperature={self.first_temperature}, last_temperature={self.last_temperature}: must "
                "be positive and fall."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def radius_of(self, levels: int) -> int:
        """Radius of a group of heads whose trees have ``levels`` levels."""
        return levels // 2 if self.radius is None else self.radius


#: Hears the layer and the balls (batch, heads, n) of every executed call.
BallListener = Callable[[int, torch.Tensor], None]


@dataclasses.dataclass
class Gumbel:
    """Content routers of a model, and the state of one pass.

    Attributes:
        routers: One for each operated layer, keyed by its index as text.
        settings: How they are trained, and what is visible.
        backend: What executes balls when not training.
        listener: Hears the balls, or None.
        training: Digits are drawn with noise and carry gradients; else they are the likeliest.
        temperature: Of Gumbel-softmax and soft mask.
        generator: Of the noise.
        balances: Load-balance loss of every layer of the last pass.
        visible: Visible pairs counted since the last reset, over heads and layers.
        executed: Pairs that were multiplied, masked ones included, likewise.
        causal: Causal pairs likewise.
    """

    routers: torch.nn.ModuleDict
    settings: GumbelSettings
    backend: BallBackend = "auto"
    listener: BallListener | None = None
    training: bool = False
    temperature: float = 1.0
    generator: torch.Generator | None = None
    balances: list[torch.Tensor] = dataclasses.field(default_factory=list)
    visible: torch.Tensor | float = 0.0
    executed: torch.Tensor | float = 0.0
    causal: float = 0.0

    def density(self) -> float:
        """Total density by tokens: visible over causal pairs."""
        return float(self.visible) / max(1.0, self.causal)

    def executed_density(self) -> float:
        """Total density of what was multiplied: all rows of a tile with all keys of every block it read.

        1 or a little more in training and with ``backend="reference"``, which skip nothing.
        """
        return float(self.executed) / max(1.0, self.causal)

    def count(self, visible: torch.Tensor, executed: torch.Tensor | float, causal: float) -> None:
        """Count pairs; tensors stay on the device: no synchronisation."""
        self.visible, self.executed = visible + self.visible, executed + self.executed
        self.causal += causal

    def reset(self) -> None:
        self.visible = self.executed = self.causal = 0.0


def gumbel_for(model: torch.nn.Module, settings: GumbelSettings) -> Gumbel:
    """Untrained routers for a model: dense."""
    inner = inner_model(model)
    text = inner.config.get_text_config()
    routers = {
        str(index): ContentRouter(
            text.hidden_size,
            text.num_attention_heads,
            settings.arities,
            settings.length,
            settings.seed * 1009 + index,
        )
        for index in attention_modules(inner)
    }
    return Gumbel(torch.nn.ModuleDict(routers).to(inner.device), settings)


def gumbel_digits(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """One-hot digits drawn by Gumbel-softmax, hard forwards and soft backwards; float32.

    Args:
        logits: (..., arity) float32.
        temperature: Of the softmax.
        generator: On the CPU, so that a seed means the same everywhere; None for no noise.
    """
    if generator is not None:
        uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
        logits = logits - torch.log(-torch.log(uniform)).to(logits.device)
    soft = torch.softmax(logits / temperature, -1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def expected_distance(digits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Levels − Σ_l min_{m ≥ l} M_m with M_m the agreement of level m; equals the distance for one-hot digits.

    Args:
        digits: (..., rows, levels, arity).
        others: (..., keys, levels, arity).
    """
    levels = digits.shape[-2]
    run = total = digits[..., levels - 1, :] @ others[..., levels - 1, :].transpose(-1, -2)
    for level in reversed(range(levels - 1)):
        run = torch.minimum(run, digits[..., level, :] @ others[..., level, :].transpose(-1, -2))
        total = total + run
    return levels - total


def load_balance(logits: torch.Tensor) -> torch.Tensor:
    """Switch-style balance, 1 where children are used evenly: arity · Σ_c share_c · mean probability_c.

    Args:
        logits: (batch, heads, n, levels, arity).
    """
    probability = torch.softmax(logits, -1)
    arity = logits.shape[-1]
    share = torch.nn.functional.one_hot(logits.argmax(-1), arity).to(probability.dtype).mean((0, 2))
    return arity * (share * probability.mean((0, 2))).sum(-1).mean()


def balls_of(logits: list[torch.Tensor], settings: GumbelSettings) -> torch.Tensor:
    """The ball of every token under the likeliest digits, (batch, heads, n) int64.

    Args:
        logits: Of the digits of each group of heads, (batch, heads of it, n, levels, arity).
        settings: For the radius.
    """
    balls = [ball_ids(part.argmax(-1), part.shape[-1], settings.radius_of(part.shape[-2])) for part in logits]
    return torch.cat(balls, 1)


def soft_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    digits: list[torch.Tensor],
    gumbel: Gumbel,
    scale: float,
) -> torch.Tensor:
    """Attention of a whole window through straight-through masks, in at least float32; pairs are counted.

    Args:
        queries: (batch, heads, n, head_dim).
        keys: (batch, kv_heads, n, head_dim).
        values: (batch, kv_heads, n, value_dim).
        digits: One-hot for each group of heads, (batch, heads of it, n, levels, arity).
        gumbel: For radius, window and temperature.
        scale: Scaling of q·k.

    Returns:
        (batch, heads, n, value_dim), the queries' dtype.
    """
    batch, heads, n, _ = queries.shape
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(heads // keys.shape[1], 1) for x in (keys, values))
    outs = []
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        out, visible = checkpoint(
            _strip,
            queries[:, :, start:stop].to(dtype) * scale,
            keys[:, :, :stop],
            values[:, :, :stop],
            [part[:, :, :stop] for part in digits],
            torch.arange(start, stop, device=queries.device),
            gumbel,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outs.append(out)
        causal = (stop * (stop + 1) - start * (start + 1)) // 2
        gumbel.count(visible, (stop - start) * stop * batch * heads, causal * batch * heads)
    return torch.cat(outs, 2).to(queries.dtype)


def _strip(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    digits: list[torch.Tensor],
    rows: torch.Tensor,
    gumbel: Gumbel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (batch, heads, rows, head_dim) over the keys up to the last of them, and their visible pairs."""
    settings, heads = gumbel.settings, queries.shape[1] // len(digits)
    always, causal = always_visible(rows, torch.arange(keys.shape[2], device=keys.device), settings.window)
    outs, visible = [], torch.zeros((), dtype=torch.float64, device=keys.device)
    for number, part in enumerate(digits):
        heads_of = slice(number * heads, (number + 1) * heads)
        radius = settings.radius_of(part.shape[-2])
        logits = queries[:, heads_of] @ keys[:, heads_of].transpose(-1, -2)
        distance = expected_distance(part[:, :, rows], part)
        hard = always | (causal & (distance <= radius + 0.5))
        soft = torch.sigmoid((radius - distance) / gumbel.temperature)
        through = torch.where(always, 1.0, hard.to(soft.dtype) + soft - soft.detach())
        weights = torch.softmax(logits.masked_fill(~hard, -torch.inf), -1) * through
        weights = weights / weights.sum(-1, keepdim=True)
        visible = visible + hard.sum()
        outs.append(weights @ values[:, heads_of])
    return torch.cat(outs, 1), visible
