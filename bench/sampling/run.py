"""Measures models in turns, each in a process of its own: one's failure costs no other's figures. No torch here.

All models of a setting are ready before the first repeat; then each makes one batch at a time, in turns, every other
round in reverse. So what changes slowly, the card's temperature and clocks, changes for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.run.process import Worker, WorkerError
from bench.sampling.rows import SamplingCase, SamplingRow
from bench.store.rows import utc_now


@dataclass(kw_only=True)
class Lane:
    """A case and its process.

    Attributes:
        case: What is measured.
        worker: The process; it imports while others do, and waits.
        seconds: Of the repeats so far.
        setup_seconds: What it took to get ready.
    """

    case: SamplingCase
    worker: Worker
    seconds: list[float] = field(default_factory=list)
    setup_seconds: float | None = None

    def ask(self, word: str, time_limit: float) -> Any:
        """Have the process do something and wait for the answer. Raises WorkerError."""
        self.worker.tell(word)
        kind, value = self.worker.answer(time_limit)
        if kind == "failed":
            raise WorkerError(*value)
        return value


def measure(
    settings: Sequence[Sequence[SamplingCase]],
    *,
    repeats: int,
    time_limit: float,
    environment: Mapping[str, Any],
    on_step: Callable[[str], object] = lambda text: None,
) -> Iterator[SamplingRow]:
    """Measure groups of cases; those of one group in turns. A row for every case, a failed one's at once.

    Args:
        settings: Groups of cases that differ in their model only.
        repeats: Timed batches of each.
        time_limit: Seconds that a model may take to get ready, and for a batch.
        environment: For the rows.
        on_step: Told what is being done.
    """
    run = utc_now()
    for cases in settings:
        yield from _measure_in_turns(
            cases, repeats=repeats, time_limit=time_limit, environment=environment, run=run, on_step=on_step
        )


def _measure_in_turns(
    cases: Sequence[SamplingCase],
    *,
    repeats: int,
    time_limit: float,
    environment: Mapping[str, Any],
    run: str,
    on_step: Callable[[str], object],
) -> Iterator[SamplingRow]:
    lanes: list[Lane] = []
    started_at = utc_now()

    def row(lane: Lane, status: Any, **fields: Any) -> SamplingRow:
        return SamplingRow(
            case=lane.case,
            status=status,
            run=run,
            seconds=tuple(lane.seconds),
            setup_seconds=lane.setup_seconds,
            started_at=started_at,
            **{"environment": environment, **fields},
        )

    def attempt(lane: Lane, word: str) -> Any:
        """The answer; or None, with the lane ended and its row in ``failed``."""
        try:
            return lane.ask(word, time_limit)
        except WorkerError as failure:
            lane.worker.end()
            lanes.remove(lane)
            failed.append(row(lane, failure.status, message=str(failure)))
            return None

    failed: list[SamplingRow] = []
    try:
        for case in cases:
            lanes.append(Lane(case=case, worker=Worker("bench.sampling.measure:serve", case)))
        for lane in list(lanes):
            on_step(f"{lane.case.label} at {lane.case.resolution}: getting ready")
            lane.setup_seconds = attempt(lane, "prepare")
        yield from failed
        failed.clear()
        for turn in range(repeats):
            for lane in list(reversed(lanes) if turn % 2 else lanes):
                on_step(f"{lane.case.label} at {lane.case.resolution}: batch {turn + 1} of {repeats}")
                seconds = attempt(lane, "sample")
                if seconds is not None:
                    lane.seconds.append(seconds)
            yield from failed
            failed.clear()
        for lane in list(lanes):
            summary = attempt(lane, "finish")
            if summary is not None:
                yield row(
                    lane,
                    "ok",
                    peak_memory_gib=summary["peak_memory_gib"],
                    environment={**environment, **summary["versions"]},
                )
        yield from failed
    finally:
        for lane in lanes:
            lane.worker.end()
