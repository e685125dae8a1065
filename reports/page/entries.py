"""Rows as the page lists and explores them: summaries, a line each, never the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.store.rows import Row
from bench.store.selection import machine
from reports.page.commands import run_command, scaling_command
from reports.page.evidence import Evidence
from reports.page.said import GIB, commit
from reports.series import STATUS_NAMES, Launches, Series, bar_ms, doubts, is_assumed, launches_of

MOST_LETTERS = 300
"""Of a failure's message."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row, or the launches of a case in a file, as one line.

    Attributes:
        file: Its file.
        model: ``DiG-S/2``.
        series: Family with options, as in every legend.
        options: The options' words alone.
        size, px, mode, batch, way, precision: Of the case; ``way`` is execution, what is compiled, and on how many GPUs
            one model was trained; ``batch`` is of all of them.
        machine: Where.
        ms, low, high: Median step and the ends of its interval; None of a failure.
        interval: What the interval is of.
        fps: Images a second.
        gib: Peak memory.
        marks: Reasons to doubt the times.
        word: Why there is no number; empty otherwise.
        message: What went wrong, or could not be said.
        commit, date: Of the measurement.
        started: When it began, to the second: of two rows of a day one is newer.
        command: What repeats it.
        assumed: The model's size is this project's assumption.
    """

    file: str
    model: str
    series: str
    options: str
    size: str
    px: int
    mode: str
    batch: int
    way: str
    precision: str
    machine: str
    ms: float | None
    low: float | None
    high: float | None
    interval: str
    fps: float | None
    gib: float | None
    marks: str
    word: str
    message: str
    commit: str
    date: str
    started: str
    command: str
    assumed: bool

    def record(self) -> Mapping[str, Any]:
        """For the page's script."""
        return asdict(self)


def entries(evidence: Evidence) -> list[Entry]:
    """Every row that counts, in the order of the files."""
    return [_entry(evidence, file, row) for file, row in (*evidence.rows, *evidence.scaled)]


def _entry(evidence: Evidence, file: str, row: Row) -> Entry:
    case = row.case
    timed = row.status == "ok"
    low, high = bar_ms(row) if timed else (None, None)
    peak = row.memory.peak if timed and row.memory is not None else None
    launches = isinstance(row, Launches)
    return Entry(
        file=file,
        model=case.model,
        series=evidence.labels[Series.of(row)],
        options=", ".join(word for _, word in case.options),
        size=f"{case.size}/{case.patch}",
        px=case.resolution,
        mode=case.mode,
        batch=case.batch * case.processes,
        way=f"{case.way}, {case.processes} GPUs by {case.together}" if case.parallel else case.way,
        precision=case.precision,
        machine=machine(row),
        ms=row.median_ms if timed else None,
        low=low,
        high=high,
        interval=""
        if not timed
        else f"{launches_of(row)} launches, fastest to slowest"
        if launches
        else f"{len(row.samples_ms)} steps, 10th to 90th percentile",
        fps=row.fps if timed else None,
        gib=peak / GIB if peak else None,
        marks=", ".join(doubts(row)),
        word="" if timed else STATUS_NAMES[row.status],
        message=row.message[:MOST_LETTERS],
        commit=commit(row.environment),
        date=row.started_at[:10],
        started=row.started_at,
        command=scaling_command(case) if case.parallel else run_command([case], launches=max(launches_of(row), 1)),
        assumed=is_assumed(case),
    )
