"""Intervals cover what they should, verdicts follow from them, and what is undecided is said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bench.judge.statistics import Interval, common_scatter, expanded_percentiles, judge, noise_floor, ratio_interval
from bench.measure.intervals import CONFIDENCE, MedianInterval


def launches(rng: np.random.Generator, n: int, *, mean: float = 10.0, noise: float = 0.01) -> list[float]:
    return list(mean * np.exp(noise * rng.standard_normal(n)))


def interval(ratio: float, low: float, high: float) -> Interval:
    return Interval(ratio=ratio, low=low, high=high)


@pytest.mark.parametrize("paired", [True, False])
def test_five_launches_cover_the_truth_as_often_as_they_claim(paired: bool) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    trials = 300
    for _ in range(trials):
        found = ratio_interval(launches(rng, 5), launches(rng, 5, mean=10.5), paired=paired)
        covered += found.low <= 1.05 <= found.high
    # The plain percentile interval covers 84% of the pairs and 88% of the others.
    assert covered / trials >= (0.9 if paired else 0.93)


def test_pairing_takes_out_the_drift_of_the_machine() -> None:
    rng = np.random.default_rng(2)
    drift = np.linspace(1, 1.3, 8)
    base, change = (list(np.array(launches(rng, 8, mean=m, noise=0.002)) * drift) for m in (10, 10.5))
    paired = ratio_interval(base, change, paired=True)
    loose = ratio_interval(base, change, paired=False)
    assert judge(paired, 0.02) == "slower"
    assert judge(loose, 0.02) == "ambiguous"
    assert paired.low <= 1.05 <= paired.high


@pytest.mark.parametrize("paired", [True, False])
def test_a_launch_in_which_the_host_was_held_up_decides_nothing(paired: bool) -> None:
    rng = np.random.default_rng(4)
    base, change = launches(rng, 18, noise=0.004), launches(rng, 18, noise=0.004)
    base[3] *= 1.35
    found = ratio_interval(base, change, paired=paired)
    assert judge(found, 0.02) == "same"
    slowed = ratio_interval(base, [1.05 * x for x in change], paired=paired)
    assert judge(slowed, 0.02) == "slower"


def test_one_answer_for_all_readers() -> None:
    base, change = [10.0, 10.1, 9.9], [10.2, 10.0, 10.4]
    assert ratio_interval(base, change, paired=False) == ratio_interval(base, change, paired=False)


def test_what_repeats_to_the_byte_has_no_width() -> None:
    found = ratio_interval([100.0] * 3, [150.0] * 3, paired=True)
    assert found.low == found.high == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("base", "change", "paired"), [([1.0], [1.0], True), ([1.0, 2.0], [1.0], True), ([1.0, 0.0], [1.0, 1.0], False)]
)
def test_too_little_to_say_is_refused(base: list[float], change: list[float], paired: bool) -> None:
    with pytest.raises(ValueError, match="launch"), np.errstate(divide="ignore"):
        ratio_interval(base, change, paired=paired)


def test_expanded_percentiles_approach_the_plain_ones() -> None:
    assert expanded_percentiles(10**6) == pytest.approx((2.5, 97.5), abs=1e-3)
    assert expanded_percentiles(5)[0] < 0.2


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.03, 1.05, "slower"),
        (0.93, 0.97, "faster"),
        (0.99, 1.01, "same"),
        (1.01, 1.05, "ambiguous"),
        (0.97, 1.03, "ambiguous"),
        (0.97, 1.0, "ambiguous"),
        (1.0, 1.02, "same"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert judge(interval(math.sqrt(low * high), low, high), 0.02) == verdict


@given(st.floats(0.5, 2), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0.001, 0.2))
def test_swapping_the_sides_swaps_the_verdict(ratio: float, below: float, above: float, effect: float) -> None:
    there = interval(ratio, ratio / (1 + below), ratio * (1 + above))
    back = interval(1 / ratio, 1 / there.high, 1 / there.low)
    swapped = {"slower": "faster", "faster": "slower", "same": "same", "ambiguous": "ambiguous"}
    edges = [abs(math.log(x)) - math.log1p(effect) for x in (there.low, there.high)]
    if min(map(abs, edges)) > 1e-9:
        assert judge(back, effect) == swapped[judge(there, effect)]


def test_noise_floor_is_a_quantile_of_distances_both_ways() -> None:
    assert noise_floor([1.01, 1 / 1.01, 1.0]) == pytest.approx(0.01, rel=0.1)
    assert noise_floor([0.5]) == noise_floor([2.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="comparisons of a side with itself"):
        noise_floor([])


def test_launches_scatter_where_both_sides_do() -> None:
    """Launches of one side alone may be erratic for what was changed."""
    steady, erratic = [10.0, 10.1, 10.2, 10.1, 10.0], [10.0, 20.0, 11.0, 25.0, 9.0]
    assert common_scatter(steady, erratic) == common_scatter(erratic, steady) == pytest.approx(0.01, rel=0.01)
    assert common_scatter(erratic, erratic) == pytest.approx(1.0)
    assert common_scatter([10.0], erratic) == 0


def test_median_intervals_are_those_of_the_binomial_law_and_say_where_values_are_too_few() -> None:
    assert MedianInterval.of([1.0] * 5).confidence == 0.9375 < CONFIDENCE
    for n in range(6, 201):
        found = MedianInterval.of(range(1, n + 1))
        rank = int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
        assert (found.low, found.high) == (rank, n + 1 - rank)
        assert found.confidence > CONFIDENCE
        assert found.confidence == pytest.approx(1 - 2 * binom.cdf(rank - 1, n, 0.5))
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(500):
        found = MedianInterval.of(list(rng.exponential(size=15) + 1))
        covered += found.low <= 1 + math.log(2) <= found.high
    assert covered / 500 >= 0.93
