"""How often the regression gate's intervals hold the truth, and its verdicts on equal code, simulated by kind of noise.

    python -m bench coverage                    # what docs/method.md quotes; some minutes
    python -m bench coverage --trials 100 --launches 6

The change is as fast as its base in every trial. Cases that are left ambiguous are not launched again here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from bench.judge.compare import Thresholds
from bench.judge.statistics import judge, ratio_interval

Noise = Callable[[np.random.Generator, int], np.ndarray]
"""Logarithms of so many launches' figures."""


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    """Half a percent of normal noise."""
    return 0.005 * rng.standard_normal(n)


def held_up(rng: np.random.Generator, n: int) -> np.ndarray:
    """The same, and in one launch of ten the host was held up, by some 15%."""
    return normal(rng, n) + np.where(rng.random(n) < 0.1, np.abs(0.15 * rng.standard_normal(n)), 0.0)


def two_speeds(rng: np.random.Generator, n: int) -> np.ndarray:
    """Half of the launches are 3% slower than the others, by where in memory they landed, say."""
    return 0.1 * normal(rng, n) + np.where(rng.random(n) < 0.5, 0.03, 0.0)


def busy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Other processes want the same cores: launches scatter by a fifth, and more for as long as more is going on."""
    load = np.repeat(rng.exponential(size=-(-n // 3)), 3)[:n]
    return 0.2 * load * rng.standard_normal(n)


NOISES: Mapping[str, Noise] = {"normal": normal, "held up": held_up, "two speeds": two_speeds, "busy": busy}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of many comparisons of equal code.

    Attributes:
        covered: Share of the intervals that hold 1.
        width: Median of high / low - 1.
        verdicts: Share of each verdict, by the regression gate's least effect.
    """

    covered: float
    width: float
    verdicts: Mapping[str, float]


def simulate(noise: Noise, launches: int, *, paired: bool, trials: int, seed: int = 0) -> Coverage:
    """Compare equal code again and again.

    Args:
        noise: Of a launch.
        launches: A side.
        paired: Whether launches are compared in rounds.
        trials: Comparisons.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    least = Thresholds().least_time
    covered, widths, verdicts = 0, [], Counter[str]()
    for _ in range(trials):
        base, change = (list(np.exp(noise(rng, launches))) for _ in range(2))
        found = ratio_interval(base, change, paired=paired)
        covered += found.low <= 1 <= found.high
        widths.append(found.high / found.low - 1)
        verdicts[judge(found, least)] += 1
    return Coverage(
        covered=covered / trials,
        width=median(widths),
        verdicts={verdict: count / trials for verdict, count in verdicts.items()},
    )


def report(launches: Iterable[int], *, trials: int) -> None:
    """Print a line for each noise, number of launches a side, and way to compare them."""
    numbers = tuple(launches)
    error = math.sqrt(0.95 * 0.05 / trials)
    print(f"{trials} comparisons of equal code a line: a share of 95% is known to {2 * error:.1%}")
    print("noise        launches       in  covered   width   same ambiguous  wrong")
    for name, noise in NOISES.items():
        for number in numbers:
            for paired in (True, False):
                found = simulate(noise, number, paired=paired, trials=trials)
                shares = found.verdicts
                same, undecided = shares.get("same", 0.0), shares.get("ambiguous", 0.0)
                wrong = shares.get("slower", 0.0) + shares.get("faster", 0.0)
                print(
                    f"{name:12} {number:8} {'rounds' if paired else 'no order':>8} {found.covered:8.1%} "
                    f"{found.width:7.2%} {same:6.1%} {undecided:9.1%} {wrong:6.1%}",
                    flush=True,
                )
