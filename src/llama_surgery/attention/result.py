"""What a call of attention returns, whoever executes it."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch


class CountedPlan(Protocol):
    """What the accounting asks of a plan, in whatever form its backend keeps it."""

    @property
    def counts(self) -> torch.Tensor:
        """(choosers, tiles), pages each tile reads."""

    def executed_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,): (query, key) pairs the far pass reads for one query head."""

    def visible_pairs(self, page_size: int) -> torch.Tensor:
        """(choosers,): pairs that the rows may see."""


@dataclasses.dataclass(frozen=True)
class AttentionResult:
    """What a call of attention returns.

    Attributes:
        out: (streams, heads, rows, value_dim), the queries' dtype.
        lse: (streams, heads, rows) log-sum-exp of the visible logits, float32 or float64.
        plans: Plans of all rows that had closed chunks.
    """

    out: torch.Tensor
    lse: torch.Tensor
    plans: Sequence[CountedPlan]
