"""How long the suite paper and the regression gate take on an H100: what runs took, and what budgets change of it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS, Budget
from bench.cases.suites import figure_1, figure_2, paper_suite
from bench.judge import regression
from bench.measure import timing
from bench.measure.timing import BLOCK_S
from bench.store.rows import Row, read_results

PUBLISHED = Path(__file__).parents[2] / "results" / "h100" / "rows.jsonl"
TUNING_S = 120.0
"""What fla may tune on a bare machine beyond the published run, whose machine had seen S and XL before: B and L took 60
and 64 s in it.
"""
GATE = Path(__file__).parents[1] / "data" / "regression" / "gate"
GATE_S = 416.0
"""Seconds of the published run (results/h100/regression/unchanged.txt), with two extra rounds of one case."""
MINUTE = 60.0


def sampling(step: float, budget: Budget) -> float:
    """The most seconds that `bench.measure.timing.sample` takes for a step of so many seconds."""
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
        patch.setattr(timing, "_perf_counter", lambda: clock)
        timing.sample(run, device="cpu", budget=budget)
    return clock


def took(rows: list[Row]) -> float:
    """Seconds from the first row's start to the last one's end."""
    first, last = (datetime.fromisoformat(row.started_at) for row in (rows[0], rows[-1]))
    return (last - first).total_seconds() + sum(rows[-1].seconds.values())


def without_rows(rows: list[Row], cases: list[Case]) -> list[Case]:
    """The cases that the published run did not measure: of a model that the suite has got since."""
    return [case for case in cases if case not in {row.case for row in rows}]


def guess(case: Case, rows: list[Row]) -> float:
    """Seconds of a case without a row: the most that any model of this size took of the same, or of anything."""

    def alike(other: Case) -> bool:
        return replace(other, model=case.model, options=case.options, source=case.source) == case

    seconds = [sum(row.seconds.values()) for row in rows if row.case.size == case.size and alike(row.case)]
    return max(seconds or [sum(row.seconds.values()) for row in rows])


def estimate(rows: list[Row], sampled: Callable[[Row, Budget], float], cases: list[Case] | None = None) -> float:
    """Seconds of the suite on a bare machine, with the budgets as they are now.

    Args:
        rows: Of the published run.
        sampled: Seconds that settling and sampling a row's step take under a budget.
        cases: Of the suite, as it is now; those without a row are guessed.
    """
    timed = [row for row in rows if row.status == "ok"]
    measured = sum(sampled(row, BUDGETS[row.case.device]) - row.seconds["measure"] for row in timed)
    missing = without_rows(rows, paper_suite() if cases is None else cases)
    return TUNING_S + took(rows) + measured + sum(guess(case, rows) for case in missing)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(read_results(PUBLISHED).rows)


def test_the_published_run_took_less_than_25_minutes_and_lacks_nothing_unsaid(rows: list[Row]) -> None:
    """A case without a row is reported, for whoever has an H100; it is no fault of whoever added it."""
    if missing := without_rows(rows, paper_suite()):
        words = ", ".join(sorted({f"{case.family} {dict(case.options)}" for case in missing}))
        warnings.warn(f"{len(missing)} cases of the suite paper have no published row: {words}", stacklevel=1)
    assert len({(row.environment["gpu_uuid"], row.environment["commit"]) for row in rows}) == 1
    assert sum("measured-again" not in row.marks for row in rows) == len({row.case for row in rows})
    assert took(rows) < 25 * MINUTE


def test_a_model_added_to_the_suite_is_estimated_until_it_is_measured(rows: list[Row]) -> None:
    measured = [row.case for row in rows]
    added = [*measured, *figure_1(["Flash-DiT:sdpa-flash"]), *figure_2(["Flash-DiT:sdpa-flash"])]
    assert without_rows(rows, measured) == []
    missing = without_rows(rows, added)
    assert {(case.family, dict(case.options)["backend"]) for case in missing} == {("Flash-DiT", "sdpa-flash")}
    assert estimate(rows, replayed, added) == estimate(rows, replayed, measured) + sum(
        guess(case, rows) for case in missing
    )
    assert all(0 < guess(case, rows) < 120 for case in missing)


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
