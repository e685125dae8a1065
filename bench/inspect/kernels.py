"""A step's device time, kernel by kernel.

The step is the benchmark's: what `bench.measure.steps` builds for the case, in graph execution its replay.
`bench.measure.profiler` reads the kernels of a few steps.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.cases.case import Case
from bench.measure.profiler import KernelTime, profile_kernels
from bench.measure.steps import build_step, capture, warm_up


def step_of(case: Case) -> Callable[[], object]:
    """Build a case in this process: its step, warmed up; in graph execution the replay of its graph."""
    step = build_step(case)
    warm_up(step.run, case.device)
    if case.execution != "graph":
        return step.run
    replay, _ = capture(step.run)
    replay()
    return replay


def kernels_of_case(case: Case, *, steps: int = 5) -> list[KernelTime]:
    """Build a case in this process and profile its step."""
    return profile_kernels(step_of(case), steps=steps, device=case.device)
