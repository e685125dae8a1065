"""The one timing function: steps in, milliseconds out. Every clock here is monotonic; the time of day may jump."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bench.cases.jobs import Budget
from bench.measure.intervals import CONFIDENCE, MedianInterval
from bench.parity.error import ParityError

Block = tuple[int, bool]
"""Steps of a block, and whether they are samples."""
_perf_counter = time.perf_counter
"""Bound before any model's code is imported: a clock that it replaces is not this one."""
_elapsed = torch.cuda.Event.elapsed_time
BLOCK_S = 0.1
"""Seconds of steps enqueued before the host waits."""
STEADY_BLOCKS = 3
LEFT_MS, LEFT_SHARE = 1.0, 0.05
CLOCK_MS, CLOCK_SHARE = 0.5, 0.01
WAITED_MS, WAITED_SHARE = 50.0, 0.5
"""Of `check_span`: the host begins before the device and may be held up; the device's clock may not run behind."""


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
        start = _perf_counter()
        self.run()
        self.host_ms.append(1000 * (_perf_counter() - start))

    def _cuda(self, steps: int) -> list[float]:
        """Time steps with events around each.

        The steps are enqueued without waiting in between: a step's time is then what it adds to a running loop, with
        the host's launches overlapped wherever the device is the slower of the two. A flush lies outside its events.
        The watch looks while the last steps are still in flight, so that it sees a busy card and costs no step time.
        """
        pairs = []
        end = None
        began = _perf_counter()
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
        ended = _perf_counter()
        torch.cuda.synchronize()
        check_span(
            events_ms=_elapsed(pairs[0][0], pairs[-1][1]),
            host_ms=1000 * (ended - began),
            left_ms=1000 * (_perf_counter() - ended),
        )
        return [_elapsed(before, after) for before, after in pairs]

    def _cpu(self, steps: int) -> list[float]:
        first = len(self.host_ms)
        for _ in range(steps):
            self._issue()
        return self.host_ms[first:]


def check_span(*, events_ms: float, host_ms: float, left_ms: float) -> None:
    """Hold the device's clock against the host's, over a block of steps.

    Args:
        events_ms: From the first step's start to the last one's end, by the device.
        host_ms: From before the first was enqueued until the last one's end was seen.
        left_ms: From there until nothing ran on the device any more.

    Raises:
        ParityError: Steps took longer than the host waited for them, or much less; or work went on after the last one's
            end, on a stream that nobody joined.
    """
    if left_ms > LEFT_MS + LEFT_SHARE * host_ms:
        raise ParityError(
            f"work went on for {left_ms:.3g} ms after the steps' end, on another stream that they did not join"
        )
    if events_ms > host_ms + CLOCK_MS + CLOCK_SHARE * host_ms:
        raise ParityError(f"steps took {events_ms:.4g} ms by their events, {host_ms:.4g} by the host's clock")
    if events_ms < (1 - WAITED_SHARE) * host_ms - WAITED_MS:
        raise ParityError(f"steps took {events_ms:.4g} ms by their events, while the host waited {host_ms:.4g}")


def sample(
    run: Callable[[], object],
    *,
    device: str,
    budget: Budget,
    watch: Callable[[], None] | None = None,
    flush: Callable[[], object] | None = None,
    fewest: int = 1,
    announce: Callable[[Block | None], object] = lambda block: None,
) -> Sampled:
    """Run a step until it is steady, then time it until the median is known well enough.

    Args:
        run: One step, run before often enough that its kernels are tuned.
        device: ``cuda`` (device time between events) or ``cpu`` (wall time).
        budget: When it is steady, and when to stop.
        watch: Called once a block, with steps in flight on a GPU.
        flush: Called before every timed step, outside its time: overwrites the L2 cache.
        fewest: Steps of a block, at least.
        announce: Told of each block before it begins, and of the end by None: processes that must run the same steps
            `follow` it.
    """
    blocks = _Blocks(run, device, watch, flush)

    def block(steps: int, *, timed: bool) -> list[float]:
        announce((steps, timed))
        return blocks.block(steps)

    begin = _perf_counter()
    first = block(1, timed=False)[0]
    steps = max(fewest, min(20, int(1000 * BLOCK_S / first))) if first > 0 else 20
    warmup, done = "none", 1
    recent: list[float] = []
    while budget.settle_max_s > 0:
        recent = [*recent[1 - STEADY_BLOCKS :], median(block(steps, timed=False))]
        done += steps
        elapsed = _perf_counter() - begin
        steady = max(recent) <= min(recent) * (1 + budget.steady)
        if len(recent) < STEADY_BLOCKS:
            continue  # Of a slow step, whose blocks may be longer than the bound, three have to be seen all the same.
        if elapsed >= budget.settle_s and (steady or elapsed >= budget.settle_max_s):
            warmup = "steady" if steady else "bound"
            break
    blocks.host_ms.clear()
    samples: list[float] = []
    begin = _perf_counter()
    while True:
        samples += block(min(steps, budget.max_samples - len(samples)), timed=True)
        elapsed = _perf_counter() - begin
        reason = _why_stop(samples, elapsed, budget)
        if reason:
            announce(None)
            return Sampled(
                samples_ms=tuple(samples),
                host_ms=median(blocks.host_ms),
                stop_reason=reason,
                warmup=warmup,
                warmup_steps=done,
            )


def follow(
    run: Callable[[], object],
    *,
    device: str,
    hear: Callable[[], Block | None],
    watch: Callable[[], None] | None = None,
) -> Sampled:
    """Run the steps that another process' `sample` announces, and time them too.

    Args:
        run: One step.
        device: As of `sample`.
        hear: Waits for the next announcement.
        watch: As of `sample`.
    """
    blocks, samples, untimed = _Blocks(run, device, watch, None), list[float](), 0
    while (told := hear()) is not None:
        steps, timed = told
        if timed and not samples:
            blocks.host_ms.clear()
        found = blocks.block(steps)
        samples += found if timed else []
        untimed += 0 if timed else steps
    return Sampled(
        samples_ms=tuple(samples),
        host_ms=median(blocks.host_ms),
        stop_reason="followed",
        warmup="followed",
        warmup_steps=untimed,
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
