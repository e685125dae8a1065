"""How long the suite paper takes on an H100, from the published rows and the budgets as they are now.

DiG on this project's kernels is not among those rows: its cases are taken to need the steps of DiG on fla's, which are
longer, and what its own rows say of building and warming up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from bench import timing
from bench.cases import paper_suite
from bench.jobs import BUDGETS, Budget
from bench.results import Row, read_results
from bench.runner import Sweep
from bench.timing import BLOCK_S
from bench.worker import EAGER

PUBLISHED = Path(__file__).parents[2] / "results" / "h100.jsonl"
OWN = PUBLISHED.with_name("h100-triton.jsonl")
PROCESS_S = 0.35
"""What a case takes beside its row's seconds: start times of the published rows less their seconds."""
PROFILE_S = 0.7
"""Starting the profiler once, with one step in it: with `PROCESS_S`, what lies between rows beside their seconds."""
GATE_S = 3.0
"""A comparison with the reference, beside the process: 0.8 to 5.1 s of S/2 and XL/2 on an H100, 2.8 in the mean."""
IMPORTED_S = 2.0
"""What fla and mamba-ssm no longer import in every process, since `bench.preload` does: half of about 5 s. (On two CPU
cores, importing fla takes 4.9 s after it and 9.6 s without.)
"""
TUNING_S = 120.0
"""What fla tunes on one bare machine beyond the published rows, whose two machines had seen S and XL before, and B
twice.
"""
MINUTE = 60.0


def sampling(step: float, budget: Budget) -> float:
    """The most seconds that `bench.timing.sample` takes for a step of so many seconds."""
    steps = max(1, min(20, int(BLOCK_S / step)))
    block = steps * step
    settling = max(budget.settle_max_s, 3 * block) + block if budget.settle_max_s else 0.0
    return step + settling + max(math.ceil(budget.min_samples / steps) * block, budget.target_s + block)


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


def eager_step(row: Row, rows: list[Row]) -> float:
    """Seconds of the step launched eagerly: the device's, or the host's of S/2 for as many blocks as it has."""
    measured = [
        other.median_ms / 1000
        for other in rows
        if (other.case.family, other.case.options, other.case.mode, other.case.execution)
        == (row.case.family, row.case.options, row.case.mode, "eager")
    ]
    blocks = {"S": 1.0, "B": 1.0, "L": 2.0, "XL": 28 / 12}[row.case.size]
    return max(row.median_ms / 1000, min(measured) * blocks)


def estimate(sampled: Callable[[Row, Budget], float]) -> tuple[float, int]:
    """Seconds of the suite, and how many of its cases the published rows tell of.

    Args:
        sampled: Seconds that sampling a row's step takes under a budget.
    """
    latest = list(read_results(PUBLISHED).latest().values())
    latest += [own_kernels(row) for row in latest if dict(row.case.options).get("recurrence") == "fla"]
    rows = [row for row in latest if row.status == "ok"]
    gates = {(row.case.model, row.case.options): row.seconds["start"] for row in rows if row.case.family != "DiT"}
    total = TUNING_S + Sweep(cases=(), time_limit=1).again_s
    total += sum(PROCESS_S + start + GATE_S for start in gates.values())
    for row in rows:
        step = row.median_ms / 1000
        beside = eager_step(row, rows) if row.case.execution == "graph" else step
        imported = IMPORTED_S if set(dict(row.case.options).values()) & {"fla", "mamba-ssm"} else 0.0
        total += PROCESS_S + row.seconds["start"] - imported + row.seconds["warmup"] + sampling(beside, EAGER)
        total += sampled(row, BUDGETS["cuda"]) + PROFILE_S + step
    return total, len(latest)


def own_kernels(row: Row) -> Row:
    """The case on this project's kernels, from its row on fla's."""
    measured = [other for other in read_results(OWN).rows if other.timing is not None]
    seconds = {name: median(other.seconds[name] for other in measured) for name in ("start", "warmup")}
    return replace(
        row, case=replace(row.case, options=(("recurrence", "triton"), ("variant", "release"))), seconds=seconds
    )


def at_most(row: Row, budget: Budget) -> float:
    return sampling(row.median_ms / 1000, budget)


def test_the_paper_suite_takes_less_than_25_minutes_on_an_h100() -> None:
    seconds, cases = estimate(replayed)
    bound, _ = estimate(at_most)
    print(f"{seconds / MINUTE:.1f} minutes, at most {bound / MINUTE:.1f}")
    assert cases == len(paper_suite())
    assert seconds < bound
    assert seconds < 24 * MINUTE
    assert bound < 25 * MINUTE


def test_more_sampling_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = estimate(at_most)
    monkeypatch.setitem(BUDGETS, "cuda", Budget(target_s=10.0))
    after, _ = estimate(at_most)
    assert after > before + 156 * 7
