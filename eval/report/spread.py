"""A figure with its spread, and what a difference between two of them is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of those values that are there; None where none is."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        return cls(statistics.median(there), min(there), max(there), len(there))

    def overlaps(self, other: Spread) -> bool:
        """Whether the two ranges have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def inverse(self, scale: float = 1.0) -> Spread:
        """The spread of `scale / value`: tokens per second from seconds."""
        return Spread(scale / self.median, scale / self.high, scale / self.low, self.count)


def luck(first: Spread, second: Spread) -> int:
    """Of how many orders one puts all of the first above all of the second: if both were equally good, 1 in so many."""
    return math.comb(first.count + second.count, first.count)
