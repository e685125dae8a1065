"""Time against tokens: from which resolution on one model takes less than another, and how it grows.

Between two measured resolutions the logarithm of a ratio is taken as linear in the logarithm of the tokens, as it is
where both times are powers of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.measure.intervals import MedianInterval
from bench.store.rows import Row
from reports.series import Launches

FEWEST = 3
"""Points that an exponent with an interval takes."""


@dataclass(frozen=True, kw_only=True)
class Between:
    """A number with an interval; its ends are None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """From which resolution on one model is ahead of another.

    Attributes:
        words: In words, where it is none of the measured range's inside: ``ahead from 256, the smallest measured``.
        side: Pixels; None where words say it.
        resolutions: Those where both were measured.
    """

    words: str = ""
    side: Between | None = None
    resolutions: tuple[int, ...] = ()


def interval_of(row: Row) -> MedianInterval:
    """The median of a row's steps with its 95% interval; of several launches their median, with their range."""
    if isinstance(row, Launches):
        low, high = row.spread_ms
        return MedianInterval(median=row.median_ms, low=low, high=high, confidence=0.95)
    return MedianInterval.of(row.samples_ms)


def ratio(of: Row, than: Row) -> Between:
    """How many times as long the second takes: the widest that both medians' intervals allow."""
    a, b = interval_of(of), interval_of(than)
    return Between(value=b.median / a.median, low=b.low / a.high, high=b.high / a.low)


def crossover(of: Mapping[int, Row], than: Mapping[int, Row]) -> Crossover | None:
    """The resolution from which on the first takes less time than the second at all larger ones measured.

    Args:
        of: Rows with times by resolution.
        than: The other model's.

    Returns:
        None where they have no resolution in common. The interval's ends are where the ends of the ratios' intervals
        cross 1.
    """
    shared = tuple(sorted(of.keys() & than.keys()))
    if not shared:
        return None
    ratios = [ratio(of[side], than[side]) for side in shared]
    middles = [math.log(one.value) for one in ratios]
    if middles[-1] <= 0:
        return Crossover(words=f"not ahead at {shared[-1]}, the largest measured", resolutions=shared)
    behind = [place for place, value in enumerate(middles) if value <= 0]
    if not behind:
        return Crossover(words=f"ahead from {shared[0]}, the smallest measured", resolutions=shared)
    at = behind[-1]
    sides = shared[at], shared[at + 1]
    ends = [(getattr(ratios[at], end), getattr(ratios[at + 1], end)) for end in ("high", "low")]
    low, high = (_root(sides, [math.log(value) for value in pair]) for pair in ends)
    middle = _root(sides, middles[at : at + 2])
    assert middle is not None
    return Crossover(side=Between(value=middle, low=low, high=high), resolutions=shared)


def _root(sides: tuple[int, int], values: Sequence[float]) -> float | None:
    """Where a line through two logarithms of ratios is zero, in pixels; None where not between them."""
    if values[0] > 0 or values[1] <= 0:
        return None
    share = values[0] / (values[0] - values[1])
    logs = [math.log(side) for side in sides]
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def exponent(values: Mapping[int, float]) -> Between | None:
    """By which power of its tokens something grows: least squares on logarithms, with the slope's 95% interval.

    Args:
        values: By resolution in pixels, of which tokens are the square over a constant.

    Returns:
        None of fewer than two. With two there is no interval.
    """
    from scipy.stats import t

    points = [(2 * math.log(side), math.log(value)) for side, value in sorted(values.items()) if value > 0]
    n = len(points)
    if n < FEWEST - 1:
        return None
    x_mean, y_mean = (sum(point[i] for point in points) / n for i in (0, 1))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    if n < FEWEST:
        return Between(value=slope)
    rest = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
    half = float(t.ppf(0.975, n - 2)) * math.sqrt(rest / (n - 2) / spread)
    return Between(value=slope, low=slope - half, high=slope + half)
