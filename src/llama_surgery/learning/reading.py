"""What a forward pass through soft gates gathered: densities and lost mass."""

import dataclasses

import torch

from llama_surgery.learning.gates import Gated


@dataclasses.dataclass
class Reading:
    """What one forward pass gathered. Pairs are for one query head, summed over layers and KV heads."""

    soft: list[torch.Tensor] = dataclasses.field(default_factory=list)
    hard: list[torch.Tensor] = dataclasses.field(default_factory=list)
    slope: list[torch.Tensor] = dataclasses.field(default_factory=list)
    lost: list[torch.Tensor] = dataclasses.field(default_factory=list)
    causal: int = 0
    rows: int = 0

    def add(self, gated: Gated, weight: float) -> None:
        """Count some rows, each standing for ``weight`` rows."""
        for name in ("soft", "hard", "slope", "lost"):
            getattr(self, name).append(getattr(gated, name).sum() * weight)

    def include_causal(self, streams: int, n: int) -> None:
        """Divide what was added by the causal pairs and rows of ``streams`` texts of ``n`` tokens, too."""
        self.causal += streams * n * (n + 1) // 2
        self.rows += streams * n

    def include(self, other: "Reading") -> None:
        """Count what another pass gathered, without its gradients."""
        for name in ("soft", "hard", "slope", "lost"):
            getattr(self, name).extend(part.detach() for part in getattr(other, name))
        self.causal += other.causal
        self.rows += other.rows

    def soft_density(self) -> torch.Tensor:
        """Expected executed far density, with gradient, on the first layer's device."""
        device = self.soft[0].device
        return torch.stack([part.to(device) for part in self.soft]).sum() / self.causal

    def density(self) -> float:
        """Executed far density at τ = 0."""
        return _total(self.hard) / self.causal

    def density_slope(self) -> float:
        """Derivative of the soft density in log θ."""
        return _total(self.slope) / self.causal

    def mass_lost(self) -> float:
        """Expected share of a row's attention on far pages it does not see."""
        return _total(self.lost) / self.rows


def _total(parts: list[torch.Tensor]) -> float:
    return float(torch.stack([part.double().to(parts[0].device) for part in parts]).sum())
