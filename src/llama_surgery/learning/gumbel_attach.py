"""Running a model under the ``gumbel`` topology: routers and attention function of its layers."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from llama_surgery.attention.balls import attend_balls, ball_backend
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.learning.gumbel import Gumbel, balls_of, gumbel_digits, load_balance, soft_attention
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules, inner_model
from llama_surgery.topology.balls import TreeOrder, order_serves, tree_order


@dataclasses.dataclass
class _Routed:
    """What routers have said that attention functions have still to read, by layer.

    Attributes:
        gumbel: Routers and what they count.
        layers: Index of every operated module, by its id.
        digits: One-hot digits of the new tokens in training, for each group of heads.
        fresh: Balls (batch, heads, new) of the new tokens.
        balls: Balls (batch, heads, n) of all tokens of the text so far.
        orders: The first of them sorted, once for as many steps as a window has tokens.
    """

    gumbel: Gumbel
    layers: dict[int, int]
    digits: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    fresh: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    balls: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    orders: dict[int, TreeOrder] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def gumbel_in(model: torch.nn.Module, gumbel: Gumbel) -> Iterator[None]:
    """Let the attention of ``model`` follow content routers for the length of a ``with`` block.

    ``forward`` on whole windows and ``generate()`` on unpadded prompts, greedy or sampled, work; balls of
    cached tokens are kept. On a GPU the token-masked kernels execute them (``Gumbel.backend``).

    Raises:
        SurgeryError: The model's attention implementation is none that can be replaced.
    """
    inner = inner_model(model)
    modules = attention_modules(inner)
    routed = _Routed(gumbel, {id(module): index for index, module in modules.items()})
    handles = [
        module.register_forward_pre_hook(functools.partial(_route, routed, index), with_kwargs=True)
        for index, module in modules.items()
    ]
    try:
        with attention_replaced(inner, modules.values(), functools.partial(_attention, routed)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _route(
    routed: _Routed, index: int, module: torch.nn.Module, args: tuple, keywords: dict[str, Any]
) -> None:
    """Ask a layer's router before its attention."""
    gumbel, hidden = routed.gumbel, args[0] if args else keywords["hidden_states"]
    router = gumbel.routers[str(index)]
    if gumbel.training:
        logits = router(hidden)
        routed.digits[index] = [gumbel_digits(part, gumbel.temperature, gumbel.generator) for part in logits]
        gumbel.balances.append(torch.stack([load_balance(part) for part in logits]).mean())
    else:
        with torch.no_grad():
            routed.fresh[index] = balls_of(router(hidden), gumbel.settings)


def _attention(
    routed: _Routed,
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    index, gumbel = routed.layers[id(module)], routed.gumbel
    if keywords.get("softcap") is not None or keywords.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} caps its logits or has attention sinks: the gumbel topology does not "
            "support it."
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise SurgeryError("the gumbel topology is executed on unpadded text only: give one prompt a call.")
    scale = keywords.get("scaling") or query.shape[-1] ** -0.5
    if gumbel.training:
        if query.shape[2] != key.shape[2]:
            raise SurgeryError("content routers are trained on whole windows, without a cache.")
        out = soft_attention(query, key, value, routed.digits.pop(index), gumbel, scale)
    else:
        balls = routed.balls[index] = _all_balls(routed, index, key.shape[2])
        if gumbel.listener is not None:
            gumbel.listener(index, balls)
        result = attend_balls(
            query,
            key,
            value,
            balls,
            window=gumbel.settings.window,
            scale=scale,
            order=_order(routed, index, balls, query, value),
            backend=gumbel.backend,
        )
        heads = query.shape[0] * query.shape[1]
        gumbel.count(
            result.seen_pairs.sum().double(), result.read_pairs.sum().double(), result.causal_pairs * heads
        )
        out = result.out
    return out.transpose(1, 2).contiguous(), None


def _all_balls(routed: _Routed, index: int, count: int) -> torch.Tensor:
    """Balls of the ``count`` tokens in the cache, the new ones last.

    A cache that was cut back keeps the balls of what is left of it.
    """
    fresh = routed.fresh.pop(index)
    past = count - fresh.shape[2]
    if not past:
        return fresh
    earlier = routed.balls.get(index)
    if earlier is None or earlier.shape[0] != fresh.shape[0] or earlier.shape[2] < past:
        raise SurgeryError(
            f"the cache holds {past} tokens that content routers have not seen: fill it inside the same "
            "gumbel_in() block."
        )
    return torch.cat((earlier[:, :, :past], fresh), 2)


def _order(
    routed: _Routed, index: int, balls: torch.Tensor, query: torch.Tensor, value: torch.Tensor
) -> TreeOrder | None:
    """The kept order of a layer's tokens, or a new one where it does not serve; None where nothing needs it.

    A step needs what lies before its window only, so that an order serves as many steps as that has tokens.
    """
    gumbel, past = routed.gumbel, balls.shape[2] - query.shape[2]
    if ball_backend(gumbel.backend, query, query, value) != "triton":
        return None
    order = routed.orders.get(index)
    if order is None or order.slots > past or not order_serves(order, balls.shape[2], gumbel.settings.window):
        order = routed.orders[index] = tree_order(balls)
    return order
