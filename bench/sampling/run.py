"""Measures models in turns, each in a process of its own: one's failure costs no other's figures. No torch here.

All models of a setting are ready before the first repeat; then each makes one batch at a time, in turns, every other
round in reverse. So what changes slowly, the card's temperature and clocks, changes for all of them alike.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from bench.run.lifeline import end_group
from bench.sampling.rows import SamplingCase, SamplingRow


class LaneError(RuntimeError):
    """A model's process did not answer as it should; ``status`` is what its row says."""

    def __init__(self, status: Any, message: str) -> None:
        super().__init__(message)
        self.status = status


def _serve(connection: Connection, case: SamplingCase) -> None:
    # Imported in the process, because it takes torch.
    from bench.sampling.measure import serve

    serve(connection, case)


@dataclass(kw_only=True)
class Lane:
    """A case and its process.

    Attributes:
        case: What is measured.
        seconds: Of the repeats so far.
    """

    case: SamplingCase
    seconds: list[float] = field(default_factory=list)
    setup_seconds: float | None = None
    _process: BaseProcess | None = None
    _connection: Any = None

    def start(self) -> None:
        """Start the process; it imports while others do, and waits."""
        # Not forked: CUDA's state would not survive it, and a server to fork from is more than a few processes need.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.case), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, word: str, time_limit: float) -> Any:
        """Have the process do something and wait for the answer. Raises LaneError."""
        assert self._process is not None
        try:
            self._connection.send(word)
            if not self._connection.poll(time_limit):
                raise LaneError("timeout", f"no answer to {word!r} after {time_limit:g} s; the process was killed")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise LaneError("error", f"the process ended with status {self._process.exitcode}") from None
        if kind == "failed":
            raise LaneError(*value)
        return value

    def end(self) -> None:
        """Kill the process, so that its memory is free, and wait until it is gone."""
        if self._process is not None:
            end_group(self._process)
            self._connection.close()
            self._process = None


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
    run = datetime.now(UTC).isoformat(timespec="seconds")
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
    lanes = [Lane(case=case) for case in cases]
    started_at = datetime.now(UTC).isoformat(timespec="seconds")

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
        except LaneError as failure:
            lane.end()
            lanes.remove(lane)
            failed.append(row(lane, failure.status, message=str(failure)))
            return None

    failed: list[SamplingRow] = []
    try:
        for lane in lanes:
            lane.start()
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
            lane.end()
