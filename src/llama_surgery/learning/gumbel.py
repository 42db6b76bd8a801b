"""The ``gumbel`` topology: digits by Gumbel-softmax on hidden states, trained with the language-model loss.

The executed mask is the trained one: both compare the same digits from the last level up, token by token.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from llama_surgery.errors import SurgeryError
from llama_surgery.learning.trainer import frozen
from llama_surgery.surgery.interface import INTERFACE_NAMES, dense_function, surgery_mask
from llama_surgery.surgery.operate import attention_modules, inner_model
from llama_surgery.topology.router import ContentRouter, always_visible, content_mask

NAME = "surgery_gumbel"
#: Rows of a strip: logits of a strip are rows × keys × heads.
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


@dataclasses.dataclass
class Gumbel:
    """Content routers of a model, and the state of one pass.

    Attributes:
        routers: One for each operated layer, keyed by its index as text.
        settings: How they are trained, and what is visible.
        training: Digits are drawn with noise and carry gradients; else they are the likeliest.
        temperature: Of Gumbel-softmax and soft mask.
        generator: Of the noise.
        balances: Load-balance loss of every layer of the last pass.
        visible: Visible pairs counted since the last reset, over heads and layers.
        causal: Causal pairs likewise.
    """

    routers: torch.nn.ModuleDict
    settings: GumbelSettings
    training: bool = False
    temperature: float = 1.0
    generator: torch.Generator | None = None
    balances: list[torch.Tensor] = dataclasses.field(default_factory=list)
    visible: torch.Tensor | float = 0.0
    causal: float = 0.0

    def density(self) -> float:
        """Measured total density: visible over causal pairs."""
        return float(self.visible) / max(1.0, self.causal)

    def reset(self) -> None:
        self.visible = self.causal = 0.0


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
    hard = torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
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


@contextlib.contextmanager
def gumbel_in(model: torch.nn.Module, gumbel: Gumbel) -> Iterator[None]:
    """Let the attention of ``model`` follow content routers for the length of a ``with`` block.

    ``forward`` on whole windows and ``generate()`` on unpadded prompts work; digits of cached tokens are
    kept.
    """
    inner = inner_model(model)
    base = inner.config.get_text_config()._attn_implementation
    if base not in INTERFACE_NAMES:
        raise SurgeryError(f"attention implementation {base!r}: supported are {', '.join(INTERFACE_NAMES)}.")
    modules = attention_modules(inner)
    state: dict[int, list[torch.Tensor]] = {}  # digits of all tokens so far, one-hot, for each group of heads
    fresh: dict[int, list[torch.Tensor]] = {}

    def route(index: int, module: torch.nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        hidden = args[0] if args else keywords["hidden_states"]
        logits = gumbel.routers[str(index)](hidden.detach() if not gumbel.training else hidden)
        noise = gumbel.generator if gumbel.training else None
        fresh[index] = [gumbel_digits(part, gumbel.temperature, noise) for part in logits]
        if gumbel.training:
            gumbel.balances.append(torch.stack([load_balance(part) for part in logits]).mean())

    handles = [
        module.register_forward_pre_hook(functools.partial(route, index), with_kwargs=True)
        for index, module in modules.items()
    ]
    operated = {id(module): index for index, module in modules.items()}
    AttentionInterface.register(NAME, functools.partial(_attention, base, gumbel, operated, state, fresh))
    AttentionMaskInterface.register(NAME, functools.partial(surgery_mask, base))
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(base)
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(NAME, None)
        for handle in handles:
            handle.remove()


def _attention(
    base: str,
    gumbel: Gumbel,
    operated: dict[int, int],
    state: dict[int, list[torch.Tensor]],
    fresh: dict[int, list[torch.Tensor]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    index = operated.get(id(module))
    if index is None:
        return dense_function(base, module)(module, query, key, value, attention_mask, **keywords)
    if attention_mask is not None and not bool(attention_mask.all()):
        raise SurgeryError("the gumbel topology is executed on unpadded text only.")
    new, count = query.shape[2], key.shape[2]
    digits = fresh.pop(index)
    if new < count:
        digits = [torch.cat(parts, 2) for parts in zip(state[index], digits, strict=True)]
    if not gumbel.training:
        state[index] = digits
    scale = keywords.get("scaling") or query.shape[-1] ** -0.5
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    outs = []
    for start in range(0, new, STRIP):
        stop = min(start + STRIP, new)
        rows = torch.arange(count - new + start, count - new + stop, device=query.device)
        run = _checkpointed if gumbel.training else _strip
        seen = count - new + stop
        out, visible = run(
            query[:, :, start:stop].to(dtype) * scale,
            keys[:, :, :seen],
            values[:, :, :seen],
            [part[:, :, :seen] for part in digits],
            rows,
            gumbel,
        )
        outs.append(out)
        gumbel.visible = visible + gumbel.visible  # stays on the device: no synchronisation
        before = count - new
        pairs = (stop - start) * before + (stop * (stop + 1) - start * (start + 1)) // 2
        gumbel.causal += pairs * query.shape[0] * query.shape[1]
    return torch.cat(outs, 2).to(query.dtype).transpose(1, 2), None


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
    position = torch.arange(keys.shape[2], device=keys.device)
    outs, visible = [], torch.zeros((), dtype=torch.float64, device=keys.device)
    for number, part in enumerate(digits):
        heads_of = slice(number * heads, (number + 1) * heads)
        radius = part.shape[-2] // 2 if settings.radius is None else settings.radius
        logits = queries[:, heads_of] @ keys[:, heads_of].transpose(-1, -2)
        if gumbel.training:
            always, causal = always_visible(rows, position, settings.window)
            distance = expected_distance(part[:, :, rows], part)
            hard = always | (causal & (distance <= radius + 0.5))
            soft = torch.sigmoid((radius - distance) / gumbel.temperature)
            through = torch.where(always, 1.0, hard.to(soft.dtype) + soft - soft.detach())
            weights = torch.softmax(logits.masked_fill(~hard, -torch.inf), -1) * through
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            path = part.argmax(-1)
            hard = content_mask(path[:, :, rows], path, rows, position, settings.window, radius)
            weights = torch.softmax(logits.masked_fill(~hard, -torch.inf), -1)
        visible = visible + hard.sum()
        outs.append(weights @ values[:, heads_of])
    return torch.cat(outs, 1), visible


_checkpointed = functools.partial(checkpoint, _strip, use_reentrant=False, preserve_rng_state=False)


@dataclasses.dataclass(frozen=True)
class GumbelStep:
    """Steps done, language-model loss in nats, load balance and measured total density of one window."""

    step: int
    loss: float
    balance: float
    density: float


def learn_gumbel(
    model: torch.nn.Module,
    windows: torch.Tensor,
    settings: GumbelSettings,
    progress: Callable[[GumbelStep], None] | None = None,
) -> Gumbel:
    """Train content routers with the language-model loss of the frozen model.

    Args:
        model: A dense decoder in evaluation mode.
        windows: (count, length) int64; step s takes window s modulo count.
        settings: How.
        progress: Told every step.
    """
    gumbel = gumbel_for(model, settings)
    gumbel.training = True
    optimiser = torch.optim.Adam(gumbel.routers.parameters(), lr=settings.rate)
    fall = settings.last_temperature / settings.first_temperature
    with frozen(model), gumbel_in(model, gumbel):
        for step in range(settings.steps):
            done = step / max(1, settings.steps - 1)
            gumbel.temperature = settings.first_temperature * fall**done
            gumbel.generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            gumbel.balances = []
            gumbel.reset()
            ids = windows[step % len(windows)][None].to(inner_model(model).device)
            loss = model(ids, labels=ids, use_cache=False).loss.float()
            balance = torch.stack([part.to(loss.device) for part in gumbel.balances]).mean()
            optimiser.zero_grad(set_to_none=True)
            (loss + settings.balance * done * balance).backward()
            norm = torch.nn.utils.clip_grad_norm_(gumbel.routers.parameters(), 1.0)
            if torch.isfinite(norm):
                optimiser.step()
            if progress is not None:
                progress(
                    GumbelStep(step + 1, float(loss.detach()), float(balance.detach()), gumbel.density())
                )
    gumbel.training = False
    gumbel.reset()
    return gumbel
