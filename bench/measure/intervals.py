"""The interval of a median of one launch's samples, which decides when sampling may stop. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """The median of one launch's samples with its interval, by order statistics."""

    median: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Width of the interval over the median."""
        return (self.high - self.low) / self.median


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> MedianInterval | None:
    """A distribution-free interval of the median: between the two order statistics that the binomial law names.

    Args:
        samples: Positive.
        confidence: At least this much of it is covered.

    Returns:
        None where there are too few samples for any such interval (fewer than 6 at 95%).
    """
    n = len(samples)
    rank = int(stats.binom.ppf((1 - confidence) / 2, n, 0.5))  # so many samples may lie outside on either side
    if rank < 1:
        return None
    ordered = sorted(samples)
    return MedianInterval(median=median(ordered), low=ordered[rank - 1], high=ordered[n - rank])
