"""The one timing function: steps in, milliseconds out. Every clock here is monotonic; the time of day may jump."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bench.cases.jobs import Budget
from bench.measure.intervals import CONFIDENCE, MedianInterval

BLOCK_S = 0.1
"""Seconds of steps enqueued before the host waits."""
STEADY_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` found.

    Attributes:
        samples_ms: Every timed step, in order.
        host_ms: Median of the host's time to issue a step.
        stop_reason: ``narrow`` (the median's interval is), ``time`` or ``samples`` (that bound was met first).
        warmup: ``steady``, ``bound`` or ``none`` (the budget has no time for it).
        warmup_steps: Untimed steps.
    """

    samples_ms: tuple[float, ...]
    host_ms: float
    stop_reason: str
    warmup: str
    warmup_steps: int

    @property
    def interval(self) -> MedianInterval:
        """Median with its 95% interval; from the smallest to the largest sample where there are fewer than six."""
        return MedianInterval.of(self.samples_ms)


class _Blocks:
    """Runs blocks of steps and keeps the host's share."""

    def __init__(
        self,
        run: Callable[[], object],
        device: str,
        watch: Callable[[], None] | None,
        flush: Callable[[], object] | None,
    ) -> None:
        self.run, self.watch, self.flush = run, watch, flush
        self.block = self._cuda if device == "cuda" else self._cpu
        self.host_ms: list[float] = []

    def _issue(self) -> None:
        start = time.perf_counter()
        self.run()
        self.host_ms.append(1000 * (time.perf_counter() - start))

    def _cuda(self, steps: int) -> list[float]:
        """Time steps with events around each.

        The steps are enqueued without waiting in between: a step's time is then what it adds to a running loop, with
        the host's launches overlapped wherever the device is the slower of the two. A flush lies outside its events.
        The watch looks while the last steps are still in flight, so that it sees a busy card and costs no step time.
        """
        pairs = []
        end = None
        for _ in range(steps):
            if self.flush is not None or end is None:
                if self.flush is not None:
                    self.flush()
                start = torch.cuda.Event(enable_timing=True)
                start.record()
            else:
                start = end
            self._issue()
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            pairs.append((start, end))
        if self.watch is not None:
            self.watch()
        pairs[-1][1].synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

    def _cpu(self, steps: int) -> list[float]:
        first = len(self.host_ms)
        for _ in range(steps):
            self._issue()
        return self.host_ms[first:]


def sample(
    run: Callable[[], object],
    *,
    device: str,
    budget: Budget,
    watch: Callable[[], None] | None = None,
    flush: Callable[[], object] | None = None,
) -> Sampled:
    """Run a step until it is steady, then time it until the median is known well enough.

    Args:
        run: One step, run before often enough that its kernels are tuned.
        device: ``cuda`` (device time between events) or ``cpu`` (wall time).
        budget: When it is steady, and when to stop.
        watch: Called once a block, with steps in flight on a GPU.
        flush: Called before every timed step, outside its time: overwrites the L2 cache.
    """
    blocks = _Blocks(run, device, watch, flush)
    begin = time.perf_counter()
    first = blocks.block(1)[0]
    steps = max(1, min(20, int(1000 * BLOCK_S / first))) if first > 0 else 20
    warmup, done = "none", 1
    recent: list[float] = []
    while budget.settle_max_s > 0:
        recent = [*recent[1 - STEADY_BLOCKS :], median(blocks.block(steps))]
        done += steps
        elapsed = time.perf_counter() - begin
        steady = max(recent) <= min(recent) * (1 + budget.steady)
        if len(recent) < STEADY_BLOCKS:
            continue  # Of a slow step, whose blocks may be longer than the bound, three have to be seen all the same.
        if elapsed >= budget.settle_s and (steady or elapsed >= budget.settle_max_s):
            warmup = "steady" if steady else "bound"
            break
    blocks.host_ms.clear()
    samples: list[float] = []
    begin = time.perf_counter()
    while True:
        samples += blocks.block(min(steps, budget.max_samples - len(samples)))
        elapsed = time.perf_counter() - begin
        reason = _why_stop(samples, elapsed, budget)
        if reason:
            return Sampled(
                samples_ms=tuple(samples),
                host_ms=median(blocks.host_ms),
                stop_reason=reason,
                warmup=warmup,
                warmup_steps=done,
            )


def _why_stop(samples: list[float], elapsed: float, budget: Budget) -> str:
    if len(samples) >= budget.max_samples:
        return "samples"
    if len(samples) < budget.min_samples:
        return ""
    if elapsed >= budget.least_s:
        interval = MedianInterval.of(samples)
        if interval.confidence >= CONFIDENCE and interval.relative_width <= budget.width:
            return "narrow"
    return "time" if elapsed >= budget.target_s else ""
