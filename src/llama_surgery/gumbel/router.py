"""Content routers: digits of a path in a tree from a token's hidden state."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from llama_surgery.errors import SurgeryError
from llama_surgery.gumbel_config import GumbelConfig


class ContentRouter(torch.nn.Module):
    """Digits of every token and head from the token's hidden state: the content router of one layer.

    A backbone of the hidden size with GELU, then a projection to heads × levels × children. Heads are cut
    into as many groups as there are arities; a group of arity p has ⌈log_p length⌉ levels. At the start the
    projection's weights are zero and its bias favours child 0 by 10 nats: all tokens share one leaf, and
    attention is dense.

    Args:
        hidden_size: Of the model.
        heads: Query heads, a multiple of the number of arities.
        arities: Children of a node, one for each group of heads.
        length: Longest text: as many leaves at least.
        seed: Of the backbone.

    Raises:
        SurgeryError: The arities do not fit.
    """

    def __init__(
        self, hidden_size: int, heads: int, arities: tuple[int, ...], length: int, seed: int
    ) -> None:
        super().__init__()
        if not arities or heads % len(arities) or min(arities) < 2:
            raise SurgeryError(
                f"arities={arities} for {heads} heads: give arities of at least 2, one for each of equally "
                "large groups of heads."
            )
        self.heads_of_group = heads // len(arities)
        self.shapes = [(levels_for(arity, length), arity) for arity in arities]
        generator = torch.Generator().manual_seed(seed)
        self.backbone = torch.nn.Linear(hidden_size, hidden_size)
        self.projections = torch.nn.ModuleList()
        with torch.no_grad():
            noise = torch.randn(hidden_size, hidden_size, generator=generator)
            self.backbone.weight.copy_(noise * hidden_size**-0.5)
            self.backbone.bias.zero_()
            for levels, arity in self.shapes:
                projection = torch.nn.Linear(hidden_size, self.heads_of_group * levels * arity)
                projection.weight.zero_()
                projection.bias.view(-1, arity).fill_(-5.0)[:, 0] = 5.0
                self.projections.append(projection)

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Of (batch, n, hidden_size) the digits' float32 logits: (batch, heads, n, levels, arity) a group."""
        features = torch.nn.functional.gelu(self.backbone(hidden.float()))
        logits = []
        for projection, (levels, arity) in zip(self.projections, self.shapes, strict=True):
            out = projection(features).unflatten(-1, (self.heads_of_group, levels, arity))
            logits.append(out.transpose(1, 2))
        return logits

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters by name: what an adapter keeps."""
        return self.state_dict()


def levels_for(arity: int, length: int) -> int:
    """⌈log_arity length⌉: levels of a tree with at least ``length`` leaves."""
    levels, leaves = 1, arity
    while leaves < length:
        levels, leaves = levels + 1, leaves * arity
    return levels


def routers_for(
    inner: PreTrainedModel, layers: Iterable[int], config: GumbelConfig, seed: int = 0
) -> dict[int, ContentRouter]:
    """Untrained routers of a model's layers, with which it is dense; on the CPU until they are called."""
    text = inner.config.get_text_config()
    return {
        index: ContentRouter(
            text.hidden_size, text.num_attention_heads, config.arities, config.length, seed * 1009 + index
        )
        for index in layers
    }
