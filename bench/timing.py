"""The one timing function: steps in, milliseconds out."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from bench.jobs import Budget

BLOCK_S = 0.1
"""Seconds of steps enqueued before the host waits."""


def _cuda_block(run: Callable[[], object], steps: int) -> list[float]:
    """Time consecutive steps with an event between each two.

    The steps are enqueued without waiting in between: a step's time is then what it adds to a running loop, with the
    host's launches overlapped wherever the device is the slower of the two.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _cpu_block(run: Callable[[], object], steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def sample(run: Callable[[], object], *, device: str, budget: Budget) -> tuple[list[float], str]:
    """Time a warmed-up step until the budget is met.

    Args:
        run: One step.
        device: ``cuda`` (device time between events) or ``cpu`` (wall time).
        budget: When to stop.

    Returns:
        Milliseconds of every timed step, in order, and the reason for stopping: ``time`` (the target was reached) or
        ``samples`` (the most samples were).
    """
    block = _cuda_block if device == "cuda" else _cpu_block
    first = block(run, 1)[0]
    settled = first
    steps = max(1, min(20, int(1000 * BLOCK_S / first)))
    while settled < 1000 * budget.settle_s:
        settled += sum(block(run, steps))
    samples: list[float] = []
    while len(samples) < budget.max_samples:
        if len(samples) >= budget.min_samples and sum(samples) >= 1000 * budget.target_s:
            return samples, "time"
        samples += block(run, min(steps, budget.max_samples - len(samples)))
    return samples, "samples"
