"""Holding one global density while heads trade budgets: the multiplier is measured, not searched for."""

import dataclasses
import math

#: Memory of the running price, and the gain with which log θ follows the hard density.
MEMORY, GAIN = 0.8, 0.3
#: Largest change of log θ in a step.
LARGEST = 0.1


@dataclasses.dataclass
class Price:
    """Lagrange multiplier of the density and the threshold that keeps it.

    log θ is one number for all heads; offsets are added to it. At the constrained optimum a uniform change of
    log θ leaves ``loss + price · density`` as it is, so the price is −(∂loss/∂log θ) / (∂density/∂log θ), of
    which both derivatives come out of the same backward pass. Heads whose own ratio is higher then gain
    budget from those whose ratio is lower. log θ itself follows the executed density, counted hard.

    Attributes:
        log_theta: Global log θ.
        value: The price, per unit of density.
        pull: Running sum of ∂loss/∂log θ.
        slope: Running sum of ∂density/∂log θ, negative.
    """

    log_theta: float
    value: float = 0.0
    pull: float = 0.0
    slope: float = 0.0

    def account(self, offset_gradient: float, slope: float) -> None:
        """Measure the price on one step.

        Args:
            offset_gradient: Derivative of ``loss + price · density`` in log θ: the sum of the gradients of
                all offsets, which move the same margins.
            slope: ∂density/∂log θ of the soft density.
        """
        self.pull = MEMORY * self.pull + (1 - MEMORY) * (offset_gradient - self.value * slope)
        self.slope = MEMORY * self.slope + (1 - MEMORY) * slope
        if self.slope < 0:
            self.value = max(0.0, -self.pull / self.slope)

    def follow(self, density: float, target: float) -> None:
        """Move log θ towards the target, given the executed density at this log θ."""
        change = GAIN * math.log(max(density, 1e-9) / target)
        self.log_theta += max(-LARGEST, min(LARGEST, change))
