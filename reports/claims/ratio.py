"""A ratio of two rows with its interval, by what the rows hold: several launches, or the samples of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from bench.judge.statistics import CONFIDENCE, Interval, ratio_interval
from bench.measure.intervals import MedianInterval
from bench.store.rows import Row
from reports.best import memory, time
from reports.series import Launches

Figure = Literal["time", "memory"]
FIGURES: dict[Figure, Callable[[Row], float | None]] = {"time": time, "memory": memory}

LEAST = 2
"""Launches of either side that an interval over launches takes."""
CAPTURED_APART, LAUNCHED_APART = 0.005, 0.1
"""What a ratio of single launches is further off by than their steps show: of steps in CUDA graphs, and of steps that
the host launches. Steps of one launch share its memory layout and clock, and say nothing of the next.
"""


def ends_ms(row: Row, *, together: int = 1) -> tuple[float, float]:
    """Between which a row's median step lies, in milliseconds.

    Of one launch by order statistics of its samples; of several, from the fastest launch to the slowest.

    Args:
        row: With times.
        together: Of how many intervals all must hold at once, in 95% (Bonferroni).
    """
    if isinstance(row, Launches):
        return row.spread_ms
    found = MedianInterval.of(row.samples_ms, 1 - (1 - CONFIDENCE) / together)
    return found.low, found.high


def ratio_of(over: Row, under: Row, figure: Figure) -> Interval | None:
    """How many times as much the one takes as the other; None where either has no such figure.

    Times: over launches (`bench.judge.statistics.ratio_interval`) where both sides have several, else from the low end
    of the one's median over the high end of the other's to the opposite, both ends at 97.5%, and wider by what launches
    differ by. A peak of a GPU's memory is the same in every launch, and its ratio is exact.
    """
    top, bottom = (FIGURES[figure](row) for row in (over, under))
    if not top or not bottom:
        return None
    if figure == "memory":
        return Interval(ratio=top / bottom, low=top / bottom, high=top / bottom)
    launches = [row.launch_ms if isinstance(row, Launches) else () for row in (over, under)]
    if min(map(len, launches)) >= LEAST:
        return ratio_interval(launches[1], launches[0], paired=False)
    (fast, slow), (least, most) = (ends_ms(row, together=2) for row in (over, under))
    apart = 1 + max(CAPTURED_APART if row.case.captures else LAUNCHED_APART for row in (over, under))
    return Interval(ratio=top / bottom, low=fast / most / apart, high=slow / least * apart)
