"""Perplexity, as a whole and by position."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.logits import Head, final_states
from llama_surgery.surgery.progress import Progress

#: Upper end of the first position bin; each further bin ends at twice the one before.
FIRST_BIN = 256


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Losses of every predicted token.

    Attributes:
        nll: (windows, length − 1), float64, nats: entry p − 1 is the loss of the token at position
            p given the p tokens before it.
        seconds: Wall time of the forward pass over each window, without the logits.
    """

    nll: torch.Tensor
    seconds: list[float]

    @property
    def value(self) -> float:
        """Perplexity over all tokens of all windows."""
        return math.exp(self.nll.mean().item())

    @property
    def per_window(self) -> list[float]:
        """Mean loss of each window, in nats per token."""
        return self.nll.mean(dim=1).tolist()

    def by_position(self) -> list[dict[str, Any]]:
        """Perplexity in bins: ``from`` (inclusive), ``to`` (exclusive), ``tokens``, ``perplexity``."""
        parts = [
            (start, stop, self.nll[:, start - 1 : stop - 1])
            for start, stop in position_bins(self.nll.shape[1] + 1)
        ]
        return [
            {"from": start, "to": stop, "tokens": own.numel(), "perplexity": math.exp(own.mean().item())}
            for start, stop, own in parts
        ]


def position_bins(length: int) -> list[tuple[int, int]]:
    """Bins of predicted positions, 1 … length − 1, that double in length: first and one past the last."""
    edges = itertools.takewhile(lambda edge: edge < length, (FIRST_BIN * 2**n for n in itertools.count()))
    return list(itertools.pairwise([1, *edges, length]))


def token_nll(head: Head, states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token of a window but the first: (length − 1,), float64, on the CPU, nats.

    ``states`` are the window's final hidden states, (length, hidden); ``input_ids`` (length,), int64.

    Raises:
        SurgeryError: A loss is not finite.
    """
    targets = input_ids[1:]
    losses = torch.cat(
        [
            F.cross_entropy(logits, targets[part].to(logits.device), reduction="none").double().cpu()
            for part, (logits,) in head.blocks(states[:-1])
        ]
    )
    if not torch.isfinite(losses).all():
        position = int((~torch.isfinite(losses)).nonzero()[0]) + 1
        raise SurgeryError(
            f"the loss is not finite (first at position {position} of {len(input_ids)}, model in "
            f"{states.dtype}). Check its weights, or load it in float32 or bfloat16."
        )
    return losses


def perplexity(
    model: nn.Module,
    input_ids: torch.Tensor,
    progress: Progress | None = None,
    *,
    head: Head | None = None,
    each: Callable[[torch.Tensor], None] | None = None,
) -> Perplexity:
    """Measures a model, dense or operated, on token windows.

    Args:
        model: A causal language model of transformers in evaluation mode.
        input_ids: (windows, length), int64.
        progress: Told after each window.
        head: The model's head, where it is known already.
        each: Given the final hidden states of each window, (length, hidden).

    Raises:
        SurgeryError: A loss is not finite.
        UnsupportedModelError: The model's logits cannot be computed block by block.
    """
    head = Head(model, input_ids[0]) if head is None else head
    losses, seconds = [], []
    for done, window in enumerate(input_ids, start=1):
        start = time.perf_counter()
        states, _ = final_states(model, window)
        if states.device.type != "cpu":
            torch.accelerator.synchronize(states.device)
        seconds.append(time.perf_counter() - start)
        losses.append(token_nll(head, states, window))
        if each is not None:
            each(states)
        if progress is not None:
            progress("perplexity", done, len(input_ids))
    return Perplexity(torch.stack(losses), seconds)


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

    Both models share the head, since no weight changes; their final hidden states are (length, hidden), on
    any device.

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
