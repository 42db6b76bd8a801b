"""How far the operated model's predictions are from the dense model's, token by token."""

import dataclasses
from typing import Any

import torch

from llama_surgery.evaluation.logits import Head
from llama_surgery.evaluation.perplexity import position_bins


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Distance of two models over the same windows.

    Attributes:
        kl: (windows, length), float64: KL(dense ‖ operated) of the next-token distribution at each
            position, nats.
        agree: (windows, length), bool: whether both rank the same token first.
    """

    kl: torch.Tensor
    agree: torch.Tensor

    @property
    def mean_kl(self) -> float:
        """Mean over all positions, nats per token."""
        return self.kl.mean().item()

    @property
    def top1(self) -> float:
        """Share of positions where both rank the same token first."""
        return self.agree.double().mean().item()

    def by_position(self) -> list[dict[str, Any]]:
        """``kl`` and ``top1`` in the bins of :meth:`Perplexity.by_position`: by the position predicted."""
        return [
            {
                "from": start,
                "to": stop,
                "kl": self.kl[:, start - 1 : stop - 1].mean().item(),
                "top1": self.agree[:, start - 1 : stop - 1].double().mean().item(),
            }
            for start, stop in position_bins(self.kl.shape[1])
        ]


def token_divergence(
    head: Head, dense: torch.Tensor, operated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares the predictions at every position of one window.

    Args:
        head: The head that both share, since no weight changes.
        dense: (length, hidden), final hidden states of the dense model, on any device.
        operated: (length, hidden), of the operated model.

    Returns:
        KL(dense ‖ operated), (length,), float64, nats; and top-1 agreement, (length,), bool; both
        on the CPU.
    """
    kl, agree = [], []
    for _, (reference, candidate) in head.blocks(dense, operated):
        log_p = reference.log_softmax(dim=-1)
        log_q = candidate.log_softmax(dim=-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().cpu())
        agree.append((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).cpu())
    return torch.cat(kl), torch.cat(agree)
