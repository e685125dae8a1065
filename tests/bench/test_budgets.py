"""How long the suite paper and the gate take on an H100: what published runs took, and what budgets change of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from bench import regression, timing
from bench.cases import paper_suite
from bench.jobs import BUDGETS, Budget
from bench.results import Row, read_results
from bench.timing import BLOCK_S

PUBLISHED = Path(__file__).parents[2] / "results" / "h100.jsonl"
TUNING_S = 120.0
"""What fla may tune on a bare machine beyond the published run, whose machine had seen S and XL before: B and L took 60
and 64 s in it.
"""
GATE = PUBLISHED.parent / "h100-gate" / "a659891" / "gate"
GATE_S = 416.0
"""Seconds of the gate's published run (``printed.txt`` beside its rows), two extra rounds of one case among them."""
MINUTE = 60.0


def sampling(step: float, budget: Budget) -> float:
    """The most seconds that `bench.timing.sample` takes for a step of so many seconds."""
    steps = max(1, min(20, int(BLOCK_S / step)))
    block = steps * step
    settling = max(budget.settle_max_s, 3 * block) + block if budget.settle_max_s else 0.0
    return step + settling + max(math.ceil(budget.min_samples / steps) * block, budget.target_s + block)


def at_most(row: Row, budget: Budget) -> float:
    assert row.median_ms is not None
    return sampling(row.median_ms / 1000, budget)


def replayed(row: Row, budget: Budget) -> float:
    """The seconds that it would have taken with the samples of a published row, again and again."""
    samples = itertools.cycle(ms / 1000 for ms in row.samples_ms)
    clock = 0.0

    def run() -> None:
        nonlocal clock
        clock += next(samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: clock)
        timing.sample(run, device="cpu", budget=budget)
    return clock


def took(rows: list[Row]) -> float:
    """Seconds from the first row's start to the last one's end."""
    first, last = (datetime.fromisoformat(row.started_at) for row in (rows[0], rows[-1]))
    return (last - first).total_seconds() + sum(rows[-1].seconds.values())


def estimate(rows: list[Row], sampled: Callable[[Row, Budget], float]) -> float:
    """Seconds of the suite on a bare machine, with the budgets as they are now.

    Args:
        rows: Of the published run.
        sampled: Seconds that settling and sampling a row's step take under a budget.
    """
    timed = [row for row in rows if row.status == "ok"]
    return TUNING_S + took(rows) + sum(sampled(row, BUDGETS[row.case.device]) - row.seconds["measure"] for row in timed)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(read_results(PUBLISHED).rows)


def test_the_published_run_is_the_whole_suite_and_took_less_than_25_minutes(rows: list[Row]) -> None:
    assert {row.case for row in rows} == set(paper_suite())
    assert len({(row.environment["gpu_uuid"], row.environment["commit"]) for row in rows}) == 1
    assert sum("measured-again" not in row.marks for row in rows) == len(paper_suite())
    assert took(rows) < 25 * MINUTE


def test_the_suite_takes_less_than_25_minutes_with_the_budgets_as_they_are(rows: list[Row]) -> None:
    seconds, bound = estimate(rows, replayed), estimate(rows, at_most)
    print(f"{seconds / MINUTE:.1f} minutes, at most {bound / MINUTE:.1f}; the run took {took(rows) / MINUTE:.1f}")
    assert seconds < bound < 25 * MINUTE
    assert seconds < 24 * MINUTE


def test_more_sampling_would_be_noticed(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    before = estimate(rows, at_most)
    monkeypatch.setitem(BUDGETS, "cuda", Budget(target_s=10.0))
    assert estimate(rows, at_most) > before + 156 * 7


def test_the_gate_takes_less_than_10_minutes_with_its_budget_as_it_is() -> None:
    rows = [row for side in ("base", "change") for row in read_results(GATE / f"{side}.jsonl").rows]
    assert {row.case for row in rows} == set(regression.gpu_suite())
    budget = regression.BUDGETS["cuda"]
    seconds = GATE_S + sum(replayed(row, budget) - row.seconds["measure"] for row in rows)
    print(f"{seconds / MINUTE:.1f} minutes; the run took {GATE_S / MINUTE:.1f}")
    assert GATE_S < seconds < 10 * MINUTE
