"""A median with an interval by order statistics: when sampling may stop, and what turns say. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import median

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """A median, and order statistics around it.

    Attributes:
        median: Of the values.
        low: A lower end.
        high: A higher end.
        confidence: With this probability the interval holds the median of whatever the values are drawn from, however
            that is distributed. Two values give 0.5, five 0.94.
    """

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Iterable[float], confidence: float = CONFIDENCE) -> MedianInterval:
        """The narrowest interval of at least this confidence; with too few values for it, least to most.

        Raises:
            ValueError: There are no values.
        """
        ordered = sorted(values)
        n = len(ordered)
        if not n:
            raise ValueError("a median needs values")
        rank, reached = _rank(n, confidence)
        return cls(median=median(ordered), low=ordered[rank - 1], high=ordered[n - rank], confidence=reached)

    @property
    def relative_width(self) -> float:
        """Width of the interval over the median."""
        return (self.high - self.low) / self.median

    def __str__(self) -> str:
        """``3.21 (3.18 to 3.22)``."""
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@cache
def _rank(n: int, confidence: float) -> tuple[int, float]:
    """Which value from either end of n the interval ends at, and the confidence that it has.

    It misses the median where fewer than ``rank`` values fall on one side, each with probability a half: the binomial
    law.
    """
    rank, reached = 1, max(0.0, 1 - 2 / 2**n)
    outcomes = below = 1  # Of 2^n: so many with rank - 1 values on a side, and with fewer than rank.
    for k in range(2, n // 2 + 1):
        outcomes = outcomes * (n - k + 2) // (k - 1)
        below += outcomes
        if (further := 1 - 2 * below / 2**n) < confidence:
            break
        rank, reached = k, further
    return rank, reached
