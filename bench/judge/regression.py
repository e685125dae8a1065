"""The regression gate: a change and its base, launched in turns, judged together. No torch here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from bench.cases.case import Case
from bench.cases.jobs import Budget
from bench.cases.suites import sweep
from bench.judge.compare import Finding, Thresholds, ambiguous_cases, compare_rows
from bench.judge.statistics import LEAST_LAUNCHES
from bench.run.checkouts import Checkout
from bench.run.side import Side, SideOf
from bench.store.lines import LinesWriter, Parse
from bench.store.rows import Row
from bench.store.selection import Measured, Subject

BUDGETS: Mapping[str, Budget] = {
    # Graphs are narrow in half a second. A step of 50 ms that the host holds up now and then is not: 16 samples of it
    # left 1.2% of noise in a launch's median, half of the variance there is between most launches.
    "cuda": Budget(settle_s=0.2, settle_max_s=1.0, least_s=0.3, target_s=2.4),
    "cpu": Budget(settle_s=0.05, settle_max_s=0.3, min_samples=5, least_s=0.1, target_s=0.5, max_samples=100),
}


def gpu_suite() -> list[Case]:
    """The regression gate's fixed cases: training and forward, small and large, and one that launches eagerly."""
    return [
        *sweep(["DiG:triton", "Flash-DiT:sdpa-cudnn"], resolutions=(1024,), modes=("train",)),
        *sweep(["DiG:triton"], resolutions=(256, 1792), modes=("train",)),
        *sweep(["DiG:triton", "DiT"], resolutions=(512,), modes=("forward",)),
        *sweep(["DiG:triton"], sizes=("XL",), resolutions=(1024,), modes=("forward",)),
        *sweep(["DiG:triton"], resolutions=(512,), modes=("train",), executions=("eager",)),
    ]


def quick_suite() -> list[Case]:
    """Two cases, for the regression gate's self-test."""
    return [
        *sweep(["DiG:triton"], resolutions=(1024,), modes=("train",)),
        *sweep(["Flash-DiT:sdpa-cudnn"], resolutions=(1024,), modes=("forward",)),
    ]


def cpu_suite() -> list[Case]:
    """A small regression gate: a forward pass each, on reference implementations."""
    return sweep(
        ["DiT", "DiG"],
        patch=8,
        resolutions=(128,),
        modes=("forward",),
        executions=("eager",),
        dtype="fp32",
        device="cpu",
    )


C = TypeVar("C", bound=Subject)
"""What is compared: cases of whole steps, or of something else."""
Of = TypeVar("Of", contravariant=True)


class Measurer(Protocol[Of]):
    """One side, as `bench.run.side.Side` is for whole steps."""

    def measure(self, case: Of, *, budget: Budget, launch: int, tell: Callable[[str], None]) -> Measured:
        """One launch of a case; ``tell`` is told what it does. Raises SideError where the side is gone."""


SUITES: dict[str, Callable[[], list[Case]]] = {"gpu": gpu_suite, "quick": quick_suite, "cpu": cpu_suite}


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[C]):
    """How a comparison is measured.

    Attributes:
        cases: What to measure.
        launches: Rounds, each with one launch of either side of every case.
        extra_launches: Rounds more for cases that are ambiguous after that, and for those alone.
        repeats: How often such extra rounds are added, at most.
        seconds: After so long no extra round begins.
        time_limit: Seconds a launch may take.
        thresholds: What counts.
        seed: Of the order.
    """

    cases: tuple[C, ...]
    launches: int = 6
    extra_launches: int = 6
    repeats: int = 2
    seconds: float = 480.0
    time_limit: float = 120.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    seed: int = 0

    @property
    def judged_by(self) -> Thresholds:
        """The thresholds, with the looks that this takes: any may be the one that errs."""
        return replace(self.thresholds, looks=len(self.cases) * (1 + self.repeats))

    def __post_init__(self) -> None:
        """Raise ValueError on a plan that cannot decide anything."""
        if self.launches < LEAST_LAUNCHES:
            raise ValueError(f"a verdict needs at least {LEAST_LAUNCHES} launches a side; got {self.launches}")
        if self.repeats < 0 or self.extra_launches < 1 or self.seconds <= 0 or self.time_limit <= 0:
            raise ValueError("repeats must not be negative; extra_launches, seconds and time_limit must be positive")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The findings, both sides' rows, and what they were judged by."""

    findings: tuple[Finding, ...]
    base: tuple[Measured, ...]
    change: tuple[Measured, ...]
    thresholds: Thresholds = field(default_factory=Thresholds)


def rounds(cases: Sequence[C], numbers: Sequence[int], draw: random.Random) -> Iterator[tuple[C, int, bool]]:
    """Case, launch number and whether it is the base's turn: cases in random order, a case's two sides one after the
    other, in random order.
    """
    for number in numbers:
        order = list(cases)
        draw.shuffle(order)
        for case in order:
            base_first = draw.random() < 0.5
            yield case, number, base_first
            yield case, number, not base_first


def compare_checkouts(
    base: Checkout,
    change: Checkout,
    plan: Plan[C],
    *,
    folder: Path,
    on_start: Callable[[str, int, int], None],
    side: Callable[..., SideOf[Any, Any]] = Side,
) -> Comparison:
    """`compare_sides` of two checkouts, each in a process of its own for as long as that takes.

    ``side`` opens the process of one, which measures what the plan's cases are; its other arguments are as there.

    Raises:
        SideError: A side's process died.
        ResultError: The folder cannot be written.
    """
    with (
        side(base, time_limit=plan.time_limit) as first,
        side(change, time_limit=plan.time_limit) as second,
    ):
        return compare_sides((first, second), plan, folder=folder, on_start=on_start, parse=first.parse)


def compare_sides(
    sides: tuple[Measurer[C], Measurer[C]],
    plan: Plan[C],
    *,
    folder: Path,
    on_start: Callable[[str, int, int], None],
    warm: bool = False,
    parse: Parse[Any] = Row.from_json,
) -> Comparison:
    """Measure both sides in turns; every row is on the disk, in ``base.jsonl`` and ``change.jsonl``, once measured.

    Args:
        sides: Of base and change.
        plan: How.
        folder: Takes the results files; must not hold any.
        on_start: Told what is waited for (side, launch, case, and what it does), as it begins: with the number of
            launches that are done, and of those to do so far as they are known.
        warm: Both sides have run the plan's cases before, and their compilers' caches are full.
        parse: Of the kind of their rows.

    Raises:
        SideError: A side's process died.
        ResultError: The folder cannot be written.
    """
    draw = random.Random(plan.seed)
    began = time.monotonic()
    rows: tuple[list[Measured], list[Measured]] = ([], [])
    with ExitStack() as stack:
        files = [folder / f"{name}.jsonl" for name in ("base", "change")]
        writers: list[LinesWriter[Any]] = [stack.enter_context(LinesWriter(file, parse)) for file in files]

        behind, known = 0, 2 * len(plan.cases) * (plan.launches + (not warm))

        def launch(case: C, number: int, is_base: bool, budget: Budget, which: str) -> Measured:
            nonlocal behind
            where = (
                f"{'base' if is_base else 'change'}, {which}, case {plan.cases.index(case) + 1} of {len(plan.cases)}"
            )
            row = sides[0 if is_base else 1].measure(
                case,
                budget=budget,
                launch=number,
                tell=lambda doing: on_start(f"{where}, {case.describe()}: {doing}", behind, known),
            )
            behind += 1
            return row

        def measure(cases: Sequence[C], numbers: range) -> list[Finding]:
            for case, number, is_base in rounds(cases, numbers, draw):
                row = launch(case, number, is_base, BUDGETS[case.device], f"launch {number + 1} of {numbers.stop}")
                writers[0 if is_base else 1].write(row)
                rows[0 if is_base else 1].append(row)
            return compare_rows(rows[0], rows[1], plan.judged_by)

        # One launch first that does not count: a side's compilers fill their caches in it.
        for case, number, is_base in rounds(plan.cases, [] if warm else [0], draw):
            launch(case, number, is_base, _ONCE, "untimed launch")
        findings = measure(plan.cases, range(plan.launches))
        done = plan.launches
        for _ in range(plan.repeats):
            ambiguous = ambiguous_cases(findings)
            undecided = [case for case in plan.cases if case in ambiguous]
            if not undecided or time.monotonic() - began > plan.seconds:
                break
            known += 2 * len(undecided) * plan.extra_launches
            findings = measure(undecided, range(done, done + plan.extra_launches))
            done += plan.extra_launches
    return Comparison(findings=tuple(findings), base=tuple(rows[0]), change=tuple(rows[1]), thresholds=plan.judged_by)


_ONCE = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=1, least_s=0.0, target_s=0.0, max_samples=1)
