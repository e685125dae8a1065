"""From launches to verdicts: rank intervals over process launches, a least effect that counts, a noise floor.

The unit is a launch, not a step. Steps of one process share its memory layout, its tuned kernels and the moment's
clock; a thousand of them are one observation. A launch is represented by the median of its samples.

Ratios are taken on logarithms, so that 2% slower and 2% faster are equally far from none. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import quantiles
from typing import Literal

import numpy as np

Verdict = Literal["faster", "same", "slower", "ambiguous"]

CONFIDENCE = 0.95
LEAST_LAUNCHES = 5
"""Fewer launches a side give no interval: their verdict is ambiguous, unless a noise floor is given."""
MOST_SCATTER = 0.2
"""Where the middle half of both sides' launches lies further apart than this, the machine was busy with something else,
which a finding notes; intervals are as wide as that makes them.
"""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio, change over base, and its confidence interval; above 1 the change takes more."""

    ratio: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Raise ValueError on what is no interval around its ratio."""
        if not 0 < self.low <= self.ratio <= self.high < math.inf:
            raise ValueError(f"need 0 < low <= ratio <= high < inf; got {self.low}, {self.ratio}, {self.high}")


@cache
def _signed_rank_law(n: int) -> np.ndarray:
    """P(T ≤ k) for k = 0, 1, …: T is the sum of those ranks of n whose difference is positive, each with chance 1/2."""
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1
    for rank in range(1, n + 1):
        chances[rank:] += chances[:-rank].copy()
        chances /= 2
    return np.cumsum(chances)


@cache
def _rank_sum_law(m: int, n: int) -> np.ndarray:
    """P(U ≤ k) for k = 0, 1, …: U counts the pairs of m and n values whose first is larger, all orders alike likely."""
    chances = [np.eye(1, m * n + 1)[0] for _ in range(n + 1)]  # Of j values of the one side among none of the other.
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            # The largest of all is of the one side, and above the j others, or of the other.
            above = np.concatenate([np.zeros(j), chances[j][: m * n + 1 - j]])
            chances[j] = (i * above + j * chances[j - 1]) / (i + j)
    return np.cumsum(chances[n])


def _by_ranks(values: np.ndarray, law: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """Between which of these values the interval lies by the law of how many are below the truth; None: too few."""
    rank = int(np.searchsorted(law, (1 - confidence) / 2 * (1 + 1e-12), side="right"))
    if not rank:
        return None
    ordered = np.sort(values)
    return float(ordered[rank - 1]), float(ordered[-rank])


def ratio_interval(
    base: Sequence[float], change: Sequence[float], *, paired: bool, confidence: float = CONFIDENCE
) -> Interval:
    """How much more the change takes than its base, with an interval over launches.

    The ratio is Hodges and Lehmann's estimate on logarithms ("Estimates of Location Based on Rank Tests", Ann. Math.
    Statist. 34, 1963): of rounds, the median of the means of all pairs of their log ratios; of launches without rounds,
    the median of all log ratios between the sides. A mean follows a single launch in which the host was held up as far
    as that went; this is led away by three in ten of them, and has 95% of the mean's efficiency where noise is normal.

    The interval is that of the rank test which the estimate comes from: Wilcoxon's signed ranks of rounds, his rank sum
    without. In a round the sides come in random order, so of equal code either is as likely to be the slower one,
    however busy the machine is, whatever it does from round to round: the interval holds the truth as often as it
    claims, exactly. Where launches are too few to reach the confidence by ranks (five pairs reach 93.75%, six 96.9%) it
    is Student's t interval, Welch's without rounds. That is no narrower than it claims where rounds are unequally noisy
    (Ibragimov and Müller, "t-Statistic Based Correlation and Heterogeneity Robust Inference", J. Bus. Econ. Statist.
    28, 2010: any mixture of normal noises, at 92% and above).

    Args:
        base, change: One positive figure a launch: median milliseconds, or bytes.
        paired: Launch i of both sides ran in the same round, so that slow drift of the machine cancels in each pair.
        confidence: Of the interval.

    Raises:
        ValueError: Fewer than two launches a side, not one of both for each round, or a figure that is not positive.
    """
    first, second = (np.log(np.asarray(side, dtype=float)) for side in (base, change))
    if min(len(first), len(second)) < 2 or not all(np.isfinite(side).all() for side in (first, second)):
        raise ValueError("an interval needs at least two launches a side, each with a positive figure")
    if paired and len(first) != len(second):
        raise ValueError(f"rounds need a launch of both sides; got {len(first)} and {len(second)}")
    if paired:
        differences = second - first
        one, other = np.triu_indices(len(differences))
        shifts = (differences[one] + differences[other]) / 2
        law = _signed_rank_law(len(differences))
    else:
        shifts = (second[:, None] - first[None, :]).ravel()
        law = _rank_sum_law(len(first), len(second))
    centre = float(np.median(shifts))
    if np.ptp(shifts) == 0:  # an allocator's peak repeats to the byte
        return Interval(ratio=math.exp(centre), low=math.exp(centre), high=math.exp(centre))
    found = _by_ranks(shifts, law, confidence)
    if found is None:
        from scipy import stats  # Late: to import it takes as long as all else that a command needs to start.

        test = stats.ttest_1samp(differences, 0) if paired else stats.ttest_ind(second, first, equal_var=False)
        found = test.confidence_interval(confidence)
    low, high = found
    return Interval(
        ratio=math.exp(centre), low=math.exp(min(centre, float(low))), high=math.exp(max(centre, float(high)))
    )


def judge(interval: Interval, least_effect: float) -> Verdict:
    """The verdict on a ratio of times (or bytes: read "faster" as smaller, "slower" as larger).

    ``slower`` and ``faster`` need the whole interval beyond the least effect, ``same`` the whole interval within it;
    an interval that reaches over an edge is ``ambiguous``, whatever its middle says.

    Args:
        interval: Of change over base.
        least_effect: The relative difference that counts, above 0: 0.02 is 2%.
    """
    if least_effect <= 0:
        raise ValueError(f"the least effect must be above 0; got {least_effect}")
    edge = 1 + least_effect
    if interval.low > edge:
        return "slower"
    if interval.high < 1 / edge:
        return "faster"
    if interval.low >= 1 / edge and interval.high <= edge:
        return "same"
    return "ambiguous"


def common_scatter(base: Sequence[float], change: Sequence[float]) -> float:
    """How far the middle half of a side's launches lies apart (upper quartile / lower - 1), the lesser of both sides.

    Of both, because a change may be what made its launches erratic, and a machine that is busy holds up both. A side of
    one launch has none.

    Args:
        base, change: One positive figure a launch.
    """

    def scatter(side: Sequence[float]) -> float:
        if len(side) < 2:
            return 0.0
        low, _, high = quantiles(side, n=4, method="inclusive")
        return high / low - 1

    return min(scatter(base), scatter(change))


def noise_floor(ratios: Sequence[float], *, quantile: float = 0.95) -> float:
    """How far apart equal code lies on a runner: a quantile of |ratio − 1| over comparisons with itself.

    Args:
        ratios: One ratio for each comparison of a side with itself (A/A).
        quantile: Of the distances, 0 to 1.

    Raises:
        ValueError: No ratios.
    """
    if not ratios:
        raise ValueError("a noise floor needs comparisons of a side with itself")
    return float(np.quantile([math.exp(abs(math.log(ratio))) - 1 for ratio in ratios], quantile))
