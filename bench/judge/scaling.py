"""What more GPUs give: throughput, efficiency and exposed communication, from the rows of ``bench scaling``.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.cases.scaling import alone_of
from bench.measure.intervals import MedianInterval
from bench.store.rows import Row
from bench.store.selection import machine


@dataclass(frozen=True, kw_only=True)
class Point:
    """A row beside that of one GPU. Intervals are the widest that both medians' 95% intervals allow.

    Attributes:
        row: Of one process or more.
        alone: Of one process, the same model launched in the same way, in the same run on the same kind of card; None
            where that has no time.
    """

    row: Row
    alone: Row | None

    @property
    def step_ms(self) -> MedianInterval | None:
        """Milliseconds a step, the slowest rank's; None of a failure."""
        return MedianInterval.of(self.row.samples_ms) if self.row.samples_ms else None

    @property
    def efficiency(self) -> MedianInterval | None:
        """Images a second over as many times those of one GPU; 1 where communication costs nothing."""
        if self.alone is None or not self.row.samples_ms or self.row.case.processes == 1:
            return None
        one, several = MedianInterval.of(self.alone.samples_ms), MedianInterval.of(self.row.samples_ms)
        return MedianInterval(
            median=one.median / several.median,
            low=one.low / several.high,
            high=one.high / several.low,
            confidence=min(one.confidence, several.confidence),
        )

    @property
    def exposed_ms(self) -> MedianInterval | None:
        """Milliseconds of a step that it would not take with nothing sent; None where that was not timed."""
        scaling = self.row.scaling
        if scaling is None or not scaling.silent_ms or not self.row.samples_ms:
            return None
        step, silent = MedianInterval.of(self.row.samples_ms), MedianInterval.of(scaling.silent_ms)
        return MedianInterval(
            median=step.median - silent.median,
            low=step.low - silent.high,
            high=step.high - silent.low,
            confidence=min(step.confidence, silent.confidence),
        )


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows of ``bench scaling``, each beside its run's row of one process; of a case, the last of a machine counts.

    Args:
        rows: Of any kind; others than these are left out.
    """
    given = [row for row in rows if row.scaling is not None]
    alone = {
        (row.scaling.run, row.case, machine(row)): row
        for row in given
        if row.scaling is not None and row.case.processes == 1 and row.status == "ok"
    }
    last = {(row.case, machine(row)): row for row in given}
    return [
        Point(row=row, alone=alone.get((row.scaling.run, alone_of(row.case), machine(row))))
        for row in last.values()
        if row.scaling is not None
    ]
