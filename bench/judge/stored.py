"""A change against the best of what was measured before, so that many small steps are seen as what they add up to.

Each of five changes that takes 1% more passes a regression gate whose least effect is 2%. Against the best of the last
few results the second of them is over it already, and an interval says so from the third on. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.judge.compare import Finding, Metric, Thresholds, compare_rows
from bench.store.selection import Measured, machine, newest

METRICS: tuple[Metric, ...] = ("time", "memory")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The launches of one case at one commit on one machine.

    Attributes:
        commit: As recorded, with a plus where there were uncommitted changes.
        rows: Those that count, with times.
        ended_at: Of its last launch, ISO 8601, UTC.
    """

    commit: str
    rows: tuple[Measured, ...]
    ended_at: str

    @property
    def name(self) -> str:
        """``0123456789ab of 2026-11-27``."""
        dirty = "+" if self.commit.endswith("+") else ""
        return f"{self.commit.removesuffix('+')[:12]}{dirty} of {self.ended_at[:10]}"

    def figure(self, metric: Metric) -> float | None:
        """Median over launches: milliseconds, or bytes; None where no launch has it."""
        if metric == "time":
            found: list[float] = [ms for row in self.rows if (ms := row.median_ms)]
        else:
            found = [row.memory.peak for row in self.rows if row.memory is not None and row.memory.peak]
        return median(found) if found else None


def last_results(rows: Iterable[Measured], like: Measured, count: int) -> list[Result]:
    """The last results of a row's case on its machine, the newest first; one a commit.

    Args:
        rows: Stored ones, of any cases.
        like: Whose case and machine.
        count: How many at most.
    """
    commits: dict[str, list[Measured]] = {}
    for row in rows:
        if row.case == like.case and machine(row) == machine(like):
            commit = str(row.environment.get("commit") or "unknown")
            commits.setdefault(f"{commit}{'+' if row.environment.get('dirty') else ''}", []).append(row)
    found = []
    for commit, own in commits.items():
        good = tuple(row for row in newest(own).rows if row.status == "ok")
        if good:
            found.append(Result(commit=commit, rows=good, ended_at=max(row.started_at for row in good)))
    return sorted(found, key=lambda result: result.ended_at, reverse=True)[:count]


def _versions(stored: Measured, own: Measured) -> list[str]:
    """What else than the code was another one then: ``torch was 2.11.0``."""
    return [
        f"{name} was {stored.environment.get(name)}"
        for name in ("torch", "triton", "driver")
        if stored.environment.get(name) != own.environment.get(name)
    ]


def against_best(
    change: Sequence[Measured], stored: Sequence[Measured], count: int, thresholds: Thresholds
) -> list[Finding]:
    """Compare a change with the best of its last stored results, case by case, in time and in memory.

    The sides were measured at different times, so there are no rounds: the interval is of the rank sum. The best of
    several noisy results is better than they are, so each comparison has the confidence of as many looks as there were
    results to choose from.

    Args:
        change: Its rows.
        stored: Rows of earlier runs.
        count: How many results to look back.
        thresholds: What counts as a difference, and how many looks share the error already.
    """
    firsts = {(row.case, machine(row)): row for row in change if row.status == "ok"}
    found = {key: last_results(stored, row, count) for key, row in firsts.items()}
    looks = thresholds.looks + sum(map(len, found.values()))
    judged_by = replace(thresholds, looks=looks)
    findings = []
    for key, results in found.items():
        own = [row for row in change if (row.case, machine(row)) == key]
        for metric in METRICS:
            measured = [(figure, result) for result in results if (figure := result.figure(metric)) is not None]
            if not measured:
                continue
            best = min(measured, key=lambda pair: pair[0])[1]
            note = "; ".join([f"best of the last {len(results)}, {best.name}", *_versions(best.rows[0], own[0])])
            findings += [
                replace(finding, note="; ".join(filter(None, (note, finding.note))))
                for finding in compare_rows(best.rows, own, judged_by, rounds=False)
                if finding.metric == metric and not finding.broken
            ]
    return findings
