"""From launches to verdicts: bootstrap intervals over process launches, a least effect that counts, a noise floor.

The unit is a launch, not a step. Steps of one process share its memory layout, its tuned kernels and the moment's
clock; a thousand of them are one observation. A launch is represented by the median of its samples.

Ratios are taken on logarithms, so that 2% slower and 2% faster are equally far from none. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Literal

import numpy as np

Verdict = Literal["faster", "same", "slower", "ambiguous"]

CONFIDENCE = 0.95
RESAMPLES = 9999
LEAST_LAUNCHES = 5
"""Fewer launches a side give no interval: their verdict is ambiguous, unless a noise floor is given. No bootstrap
reaches beyond its observations, and the range of n pairs holds the truth in 1 − 2^(1−n) of all cases: 75% of three, 94%
of five.
"""
_NUMBERS_AT_ONCE = 2**20
"""How many numbers a step of the bootstrap holds: pairs are many where launches are."""
MOST_SCATTER = 0.2
"""Where the middle half of both sides' launches lies further apart than this, the machine was busy with something else.
Six launches of unchanged code that wait for other processes are all slower than their bases once in 64 runs.
"""
SEED = 0
"""The bootstrap draws the same samples every time: two readers of one file get one answer."""


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


def expanded_percentiles(n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentiles of a bootstrap distribution between which an interval of few observations lies, 0 to 100.

    The plain percentile interval of n observations is too narrow by about the factor sqrt((n−1)/n) · z / t(n−1), for
    resampling divides by n and knows no t; asking for wider percentiles undoes both (Hesterberg, "What Teachers Should
    Know About the Bootstrap", arXiv 1411.5279, section 3.3: the expanded percentile interval).

    Args:
        n: Observations, more than 1.
        confidence: Of the interval.
    """
    from scipy import stats  # Late: to import it takes as long as all else that a command needs to start.

    tail = (1 - confidence) / 2
    widened = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(1 - tail, n - 1)))
    return 100 * widened, 100 * (1 - widened)


def _middle_of_pairs(differences: np.ndarray) -> np.ndarray:
    """The Hodges–Lehmann estimate over the last axis: the median of the means of all pairs, each with itself too."""
    first, second = np.triu_indices(differences.shape[-1])
    return np.asarray(np.median((differences[..., first] + differences[..., second]) / 2, axis=-1))


def ratio_interval(
    base: Sequence[float], change: Sequence[float], *, paired: bool, confidence: float = CONFIDENCE
) -> Interval:
    """How much more the change takes than its base, with a bootstrap interval at launch level.

    The ratio is Hodges and Lehmann's estimate on logarithms ("Estimates of Location Based on Rank Tests", Ann. Math.
    Statist. 34, 1963): of rounds, the median of the means of all pairs of their log ratios; of launches without rounds,
    the median of all log ratios between the sides. A mean follows a single launch in which the host was held up as far
    as that went; this is led away by three in ten of them, and has 95% of the mean's efficiency where noise is normal.
    (The bootstrap may draw one such launch several times: among 6 or 12 it makes the interval wide, among 18 it
    doesn't.)

    Args:
        base, change: One positive figure a launch: median milliseconds, or bytes.
        paired: Launch i of both sides ran in the same round, so that slow drift of the machine cancels in each pair;
            rounds are drawn then, and launches of each side otherwise.
        confidence: Of the interval.

    Raises:
        ValueError: Fewer than two launches a side, not one of both for each round, or a figure that is not positive.
    """
    logs = [np.log(np.asarray(side, dtype=float)) for side in (base, change)]
    if min(map(len, logs)) < 2 or not all(np.isfinite(side).all() for side in logs):
        raise ValueError("an interval needs at least two launches a side, each with a positive figure")
    if paired and len(logs[0]) != len(logs[1]):
        raise ValueError(f"rounds need a launch of both sides; got {len(logs[0])} and {len(logs[1])}")

    def shift(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        if paired:
            return _middle_of_pairs(second - first)
        between = second[..., :, None] - first[..., None, :]
        return np.asarray(np.median(between.reshape(*between.shape[:-2], -1), axis=-1))

    centre = float(shift(*logs))
    if all(np.ptp(side) == 0 for side in logs):  # an allocator's peak repeats to the byte
        return Interval(ratio=math.exp(centre), low=math.exp(centre), high=math.exp(centre))
    from scipy import stats

    drawn = stats.bootstrap(
        tuple(logs),
        shift,
        paired=paired,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // (len(logs[0]) * len(logs[1]))),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).bootstrap_distribution
    # Without pairs, the smaller side decides: its observations are what the interval hangs on.
    low, high = np.percentile(drawn, expanded_percentiles(min(map(len, logs)), confidence))
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


def judge_launches(
    base: Sequence[float], change: Sequence[float], interval: Interval | None, least_effect: float
) -> Verdict:
    """The verdict on a ratio (`judge`), unless there is no interval or the launches scatter too much to have one."""
    if interval is None or common_scatter(base, change) > MOST_SCATTER:
        return "ambiguous"
    return judge(interval, least_effect)


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
