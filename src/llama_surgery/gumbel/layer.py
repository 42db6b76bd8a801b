"""What an attention module carries under the ``gumbel`` topology, and how it attends."""

import dataclasses
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.gumbel.balls import always_pairs, attend_balls
from llama_surgery.gumbel.cache import balls_with
from llama_surgery.gumbel.router import ContentRouter
from llama_surgery.gumbel.soft import Drawing, balls_of, gumbel_digits, load_balance, soft_attention
from llama_surgery.gumbel_config import GumbelConfig
from llama_surgery.surgery.calls import untraced
from llama_surgery.surgery.statistics import Counters
from llama_surgery.surgery.supported import refuse

#: Keyword by which the pre-forward hook hands on what the router said.
ROUTED = "llama_surgery_routed"


@dataclasses.dataclass
class GumbelLayer:
    """What an operated attention module carries.

    Attributes:
        config: The operation's configuration.
        router: The layer's content router.
        counters: Counts by tile size: lists over query heads, since each has balls of its own.
        drawing: How digits are drawn in training; None where the likeliest are executed.
    """

    config: SurgeryConfig
    router: ContentRouter
    counters: dict[int, Counters] = dataclasses.field(default_factory=dict)
    drawing: Drawing | None = None

    @property
    def gumbel(self) -> GumbelConfig:
        assert self.config.gumbel is not None
        return self.config.gumbel

    def route(self, hidden: torch.Tensor, layer: object) -> torch.Tensor | list[torch.Tensor]:
        """Ask the router of what the module reads, (batch, new, hidden_size); ``layer`` is the cache's.

        Returns:
            The balls of all tokens so far, (batch, heads, n) int64; in training the digits instead, one-hot
            for each group of heads, (batch, heads of it, n, levels, arity).
        """
        if next(self.router.parameters()).device != hidden.device:
            self.router.to(hidden.device)
        drawing = self.drawing
        if drawing is None:
            with torch.no_grad():
                return balls_with(layer, balls_of(self.router(hidden), self.gumbel))
        logits = self.router(hidden)
        drawing.balances.append(torch.stack([load_balance(part) for part in logits]).mean())
        return [gumbel_digits(part, drawing.temperature, drawing.generator) for part in logits]

    @untraced
    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention function; arguments and results are those of ``surgery_attention``."""
        refuse(module, attention_mask, keywords)
        routed = keywords.get(ROUTED)
        if routed is None or keywords.get("softcap") is not None or keywords.get("s_aux") is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} caps its logits, has attention sinks, or does not pass keywords on "
                "to its attention function: the gumbel topology does not support it."
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise SurgeryError(
                "the gumbel topology is executed on unpadded text only: give one prompt a call."
            )
        scale = keywords.get("scaling") or query.shape[-1] ** -0.5
        count, rows = key.shape[2], query.shape[2]
        if self.drawing is not None:
            if rows != count:
                raise SurgeryError("content routers are trained on whole windows, without a cache.")
            out, seen = soft_attention(
                query, key, value, routed, self.gumbel, self.drawing.temperature, scale
            )
            read = torch.full_like(seen, query.shape[0] * count * count)
        else:
            window = self.gumbel.window
            out, seen, read = attend_balls(query, key, value, routed, window=window, scale=scale)
        self._count(query.shape[0], count - rows, rows, seen, read)
        return out.transpose(1, 2).contiguous(), None

    def _count(self, batch: int, past: int, rows: int, seen: torch.Tensor, read: torch.Tensor) -> None:
        """Count a call: its near field is position 0 and window, all else that it saw or read is far."""
        near = always_pairs(past + rows, self.gumbel.window) - always_pairs(past, self.gumbel.window)
        causal = rows * (2 * past + rows + 1) // 2
        tile = 1 if rows == 1 and past else self.config.tile
        counters = self.counters.setdefault(tile, Counters())
        counters.count(rows * batch, near * batch, causal * batch)
        counters.count_far(read - near * batch, seen - near * batch)
