"""A threshold, found by what a few passes of a model measure at others."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Search(NamedTuple):
    """How to look for the largest x, nearly, at which something positive that rises with x is within a limit.

    Attributes:
        low, high: The least and the largest x.
        slope: What the logarithm of what is measured rises by with x, until two x were tried.
        stride: The farthest from one x to the next.
        enough, aim: The share of the limit that is enough, and the one that is aimed at.
        near: Two x that are as good as one.
        tries: x that are tried at most.
    """

    low: float
    high: float
    slope: float
    stride: float
    enough: float
    aim: float
    near: float
    tries: int

    def run(
        self,
        measure: Callable[[float], float],
        limit: float,
        start: float,
        hopeless: Callable[[float], bool] = lambda x: False,
    ) -> dict[float, float]:
        """What was measured, by x, in order. ``hopeless`` says of an x beyond the limit that all are."""
        low, high, at = self.low, self.high, min(max(start, self.low), self.high)
        tried: dict[float, float] = {}
        for _ in range(self.tries):
            tried[at] = found = measure(at)
            low, high = (low, at) if found > limit else (at, high)
            enough = self.enough * limit <= found <= limit
            if enough or high - low < self.near or (found > limit and hopeless(at)):
                break
            at = self._next(tried, low, high, self.aim * limit)
        return tried

    def _next(self, tried: dict[float, float], low: float, high: float, aim: float) -> float:
        """By the slope of the logarithm between the last two x, inside what is left."""
        points = [(at, math.log(max(found, 0.01 * aim))) for at, found in list(tried.items())[-2:]]
        (before, one), (at, other) = points[0], points[-1]
        slope = self.slope
        if before != at:
            slope = min(max((other - one) / (at - before), slope / 4), 6 * slope)
        found = at + min(max((math.log(aim) - other) / slope, -self.stride), self.stride)
        inside, same_side = low < found < high, (one > math.log(aim)) == (other > math.log(aim))
        if low in tried and high in tried and (same_side or not inside):
            return (low + high) / 2  # it goes in steps there
        return min(max(found, low), high)
