"""Intervals cover what they should, verdicts follow from them, and what is undecided is said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, mannwhitneyu, wilcoxon

from bench.cases.case import Case
from bench.judge.regression import Plan
from bench.judge.statistics import (
    Interval,
    _rank_sum_law,
    _signed_rank_law,
    common_scatter,
    judge,
    noise_floor,
    ratio_interval,
)
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


def test_an_interval_ends_where_its_rank_test_does() -> None:
    """A shift within it is not refused at its level, one beyond is: by scipy's exact tests."""
    rng = np.random.default_rng(5)
    base, change = launches(rng, 9, noise=0.05), launches(rng, 9, noise=0.05)
    for paired in (True, False):
        found = ratio_interval(base, change, paired=paired, confidence=0.97)
        for end, outwards in ((found.low, -1), (found.high, 1)):
            for step, refused in ((outwards, True), (-outwards, False)):
                shifted = np.log(change) - math.log(end) - 1e-6 * step
                if paired:
                    p = wilcoxon(shifted - np.log(base), method="exact").pvalue
                else:
                    p = mannwhitneyu(shifted, np.log(base), method="exact").pvalue
                assert (p <= 0.03) == refused


def test_laws_of_ranks_count_every_order_once() -> None:
    assert list(_signed_rank_law(3) * 8) == [1, 2, 3, 5, 6, 7, 8]
    assert list(_rank_sum_law(2, 2) * 6) == pytest.approx([1, 2, 4, 5, 6])
    assert _rank_sum_law(5, 7)[-1] == pytest.approx(1)
    assert list(_rank_sum_law(5, 7)) == pytest.approx(list(_rank_sum_law(7, 5)))
    # As many orders as a double cannot count: each sum is as likely as the one as far from the other end.
    law = _rank_sum_law(40, 40)
    assert law[:-1] + law[-2::-1] == pytest.approx(1)


def test_too_few_for_ranks_are_as_far_apart_as_student_says() -> None:
    base, change = [1.0, 1.0, 1.0, 1.0], [math.exp(x) for x in (0.0, 0.1, 0.2, 0.3)]
    half = 3.1824 * np.std([0.0, 0.1, 0.2, 0.3], ddof=1) / 2
    found = ratio_interval(base, change, paired=True)
    assert math.log(found.low) == pytest.approx(0.15 - half, abs=1e-4)
    assert math.log(found.high) == pytest.approx(0.15 + half, abs=1e-4)


def busy(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of two launches a round on a machine whose load comes and goes, and drifts while they run."""
    load = 0.15 * np.repeat(rng.exponential(size=rounds // 3), 3)
    drift = np.cumsum(0.1 * rng.standard_normal(2 * rounds)).reshape(rounds, 2)
    drift = np.take_along_axis(drift, rng.random((rounds, 2)).argsort(axis=1), axis=1)  # Sides in random order.
    both = drift + load[:, None] * rng.standard_normal((rounds, 2))
    return both[:, 0], both[:, 1]


def decide(base: np.ndarray, change: np.ndarray, plan: Plan) -> str:
    """What the regression gate would say: after six rounds, and where it is open after twelve and eighteen."""
    verdict = "ambiguous"
    for looked in range(1 + plan.repeats):
        n = plan.launches + looked * plan.extra_launches
        confidence = plan.judged_by.confidence
        found = ratio_interval(np.exp(base[:n]), np.exp(change[:n]), paired=True, confidence=confidence)
        if (verdict := judge(found, 0.02)) != "ambiguous":
            break
    return verdict


CASES = tuple(
    Case(model="DiT-S/8", resolution=64 * i, mode="forward", dtype="fp32", device="cpu") for i in (1, 2, 3, 4)
)


def test_equal_code_on_a_busy_machine_is_called_other_in_no_more_runs_than_claimed() -> None:
    """Of runs over four cases, each looked at up to three times, 5% at most may err in any of it; of intervals of 95%
    each, 16% of the runs err.
    """
    rng = np.random.default_rng(6)
    plan = Plan(cases=CASES)
    erred = 0
    for _ in range(250):
        erred += any(decide(*busy(rng, 18), plan) in ("slower", "faster") for _ in CASES)
    assert erred / 250 <= 0.05


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_a_step_that_takes_a_fifth_longer_is_found(noise: float) -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        base, change = (noise * rng.standard_normal(18) for _ in range(2))
        assert decide(base, change + math.log(1.2), Plan(cases=CASES)) == "slower"


def test_a_large_slowdown_is_found_however_launches_vary() -> None:
    rng = np.random.default_rng(8)
    found = [
        decide(base, change + math.log(3), Plan(cases=CASES)) for base, change in (busy(rng, 18) for _ in range(50))
    ]
    assert set(found) <= {"slower", "ambiguous"}
    assert found.count("slower") >= 45


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
