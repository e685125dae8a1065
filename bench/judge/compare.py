"""Two sides' rows, case by case: verdicts on time and memory, the exit status, and a summary in Markdown.

The statuses are the regression gate's: 0 no regression, 1 a regression, 3 nothing measured or inconclusive. A case that
ran on neither side is listed and counts for none of them. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from bench.judge.statistics import (
    CONFIDENCE,
    LEAST_LAUNCHES,
    MOST_SCATTER,
    Interval,
    Verdict,
    common_scatter,
    judge,
    ratio_interval,
)
from bench.messages import cell
from bench.store.selection import Measured, Subject, by_case_and_machine, newest

NO_REGRESSION, REGRESSION, INCONCLUSIVE = 0, 1, 3
MEMORY_EFFECT = 0.01
"""The least change of a memory peak that counts: allocators repeat to the byte, but for the rounding of blocks."""
RESIDENT_EFFECT = 0.1
"""The same on a CPU, where the peak is the process's resident set, with all of Python and torch in it."""

LASTING = frozenset({"oom", "unsupported"})
"""Statuses that are a property of case and machine; a timeout or an error may have been the moment's."""

Metric = Literal["time", "memory"]
Outcome = Verdict | Literal["unmeasured"]
WORDS: Mapping[Metric, Mapping[Outcome, str]] = {
    "time": {"faster": "faster", "same": "same", "slower": "**slower**"},
    "memory": {"faster": "smaller", "same": "same", "slower": "**larger**"},
}


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts as a difference.

    Attributes:
        time: Least relative difference of times, above 0.
        memory: The same of memory peaks.
        noise: The runner's noise floor (`bench.judge.statistics.noise_floor`), or None where it was not measured. A
            least effect is never below it, and it is the interval where a side has too few launches.
        looks: Verdicts that share the 5% of error: a run that looks at 4 cases up to 3 times has 12 chances to call
            equal code slower.
    """

    time: float = 0.02
    memory: float = MEMORY_EFFECT
    noise: float | None = None
    looks: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError on thresholds that cannot be."""
        if self.time <= 0 or self.memory <= 0:
            raise ValueError("a least effect must be above 0")
        if self.noise is not None and self.noise < 0:
            raise ValueError(f"a noise floor must not be negative; got {self.noise}")
        if self.looks < 1:
            raise ValueError(f"there is at least one look; got {self.looks}")

    @property
    def confidence(self) -> float:
        """Of each interval, so that all of them hold the truth together with 95% (Bonferroni)."""
        return 1 - (1 - CONFIDENCE) / self.looks

    @property
    def least_time(self) -> float:
        """The least effect on time: the chosen one, or the noise floor where that is larger."""
        return max(self.time, self.noise or 0.0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One case under one metric.

    Attributes:
        case: Which.
        metric: ``time`` (milliseconds) or ``memory`` (bytes of the peak).
        base, change: Median over launches; None where a side has none. The interval's ratio is not their quotient.
        launches: Of base and change.
        interval: Of change over base; None where there is none to give.
        verdict: As `judge` has it; ``ambiguous`` without an interval; ``unmeasured`` where there was nothing to compare
            and nothing to lose: the case ran on neither side, or does not fit the machine on the base's.
        note: Why there is no number, or what to know about it.
        broken: The base has a number and the change has none, where it should: that is a regression.
        machine: On which it was compared; ``X against Y`` where the sides ran on two.
    """

    case: Subject
    metric: Metric
    base: float | None = None
    change: float | None = None
    launches: tuple[int, int] = (0, 0)
    interval: Interval | None = None
    verdict: Outcome = "ambiguous"
    note: str = ""
    broken: bool = False
    machine: str = ""

    @property
    def ratio(self) -> float | None:
        """Change over base: the interval's, or the quotient of the medians; None where a side has no number."""
        if self.interval is not None:
            return self.interval.ratio
        return self.change / self.base if self.base and self.change else None


def compare_rows(
    base: Iterable[Measured],
    change: Iterable[Measured],
    thresholds: Thresholds,
    *,
    across_machines: bool = False,
    rounds: bool = True,
) -> list[Finding]:
    """Compare two sides, case by case, in the base's order; a case that only one side has is left out.

    Of each side the rows count that `bench.store.selection.newest` chooses. A case is compared on every machine that
    both sides have it on; where there is none, the last machine of either side is looked at, and gets no verdict. Rows
    of both sides that have the same set of launch numbers are taken as rounds, launch i beside launch i.

    Args:
        base, change: Rows, in the order they were measured.
        thresholds: What counts as a difference.
        across_machines: Judge a case on two machines too, as two sides without rounds.
        rounds: Take launches of equal numbers as rounds; not where the sides were measured at different times.
    """
    sides = [by_case_and_machine(newest(rows).rows) for rows in (base, change)]
    findings = []
    for case, machines in sides[0].items():
        others = sides[1].get(case)
        if others is None:
            continue
        for name in (common := [name for name in machines if name in others]):
            found = _compare_case(case, machines[name], others[name], thresholds, paired=rounds)
            findings += [replace(finding, machine=name) for finding in found]
        if not common:
            names = [list(side)[-1] for side in (machines, others)]
            found = _compare_case(case, machines[names[0]], others[names[1]], thresholds, paired=False)
            if not across_machines:
                found = [replace(finding, verdict="ambiguous", broken=False, note=_OTHER_MACHINE) for finding in found]
            findings += [replace(finding, machine=" against ".join(names)) for finding in found]
    return findings


_OTHER_MACHINE = "measured on two machines; --across-machines judges all the same"


def _compare_case(
    case: Subject, base: Sequence[Measured], change: Sequence[Measured], thresholds: Thresholds, *, paired: bool = True
) -> list[Finding]:
    good = [[row for row in rows if row.status == "ok"] for rows in (base, change)]
    if not good[0] or not good[1]:
        return [_missing(case, base, change, good)]
    hashes = {row.checks.inputs for rows in good for row in rows if row.checks is not None}
    if len(hashes) > 1:
        return [Finding(case=case, metric="time", note="the sides were given other inputs, so they are not comparable")]
    findings = []
    lost = [len(rows) - len(ok) for rows, ok in zip((base, change), good, strict=True)]
    for metric in ("time", "memory"):
        figures = [[(row.launch, x) for row in rows if (x := _figure(row, metric))] for rows in good]
        finding = _judge(case, metric, figures, thresholds, paired=paired)
        if finding is not None:
            findings.append(finding)
    if lost[1] > lost[0]:
        failed = next(row for row in change if row.status != "ok")
        note = f"{lost[1]} of {len(change)} launches of the change failed ({failed.status}: {failed.message:.120})"
        findings.append(Finding(case=case, metric="time", note=note, broken=True))
    return findings


def _missing(
    case: Subject, base: Sequence[Measured], change: Sequence[Measured], good: Sequence[Sequence[Measured]]
) -> Finding:
    """What to say of a case that has no number on one side or on both."""
    words = [f"{row.status}{f': {row.message:.120}' if row.message else ''}" for row in (base[0], change[0])]
    if good[0]:
        return Finding(case=case, metric="time", note=f"the change failed: {words[1]}", broken=True)
    if not good[1]:
        note = f"neither side ran; the base: {words[0]}; the change: {words[1]}"
        return Finding(case=case, metric="time", note=note, verdict="unmeasured")
    # A base that failed by chance may hide a regression; one that cannot run here hides none.
    lasting = all(row.status in LASTING for row in base)
    return Finding(
        case=case,
        metric="time",
        note=f"the base failed ({words[0]}), the change did not",
        verdict="unmeasured" if lasting else "ambiguous",
    )


def _figure(row: Measured, metric: Metric) -> float | None:
    if metric == "time":
        return row.median_ms
    return float(row.memory.peak) if row.memory is not None and row.memory.peak else None


def _judge(
    case: Subject, metric: Metric, figures: Sequence[list[tuple[int, float]]], thresholds: Thresholds, *, paired: bool
) -> Finding | None:
    values = [[x for _, x in side] for side in figures]
    if not values[0] or not values[1]:
        return None
    effect = thresholds.least_time if metric == "time" else thresholds.memory
    if metric == "memory" and case.device == "cpu":
        effect = max(effect, RESIDENT_EFFECT)
    base, change = median(values[0]), median(values[1])
    launches = (len(values[0]), len(values[1]))
    interval, note = None, ""
    if min(launches) >= LEAST_LAUNCHES:
        rounds = [launch for launch, _ in figures[0]] == [launch for launch, _ in figures[1]]
        interval = ratio_interval(values[0], values[1], paired=paired and rounds, confidence=thresholds.confidence)
    elif metric == "memory" and case.device == "cuda":
        # The allocator of a GPU hands out the same blocks in every launch: one is enough.
        interval = Interval(ratio=change / base, low=change / base, high=change / base)
    elif metric == "time" and thresholds.noise is not None:
        spread = 1 + thresholds.noise
        interval = Interval(ratio=change / base, low=change / base / spread, high=change / base * spread)
        note = "interval from the noise floor"
    else:
        note = f"needs {LEAST_LAUNCHES} launches a side" + (" or a noise floor" if metric == "time" else "")
    apart = common_scatter(values[0], values[1])
    if apart > MOST_SCATTER:
        note = f"the middle half of either side's launches lies {apart:.0%} apart: the machine was busy"
    return Finding(
        case=case,
        metric=metric,
        base=base,
        change=change,
        launches=launches,
        interval=interval,
        verdict="ambiguous" if interval is None else judge(interval, effect),
        note=note,
    )


def ambiguous_cases(findings: Iterable[Finding]) -> list[Subject]:
    """The cases that more launches may decide, each once."""
    return list(dict.fromkeys(f.case for f in findings if f.verdict == "ambiguous" and f.interval is not None))


def exit_status(findings: Sequence[Finding]) -> int:
    """1 where anything got worse; else 3 where anything is undecided or nothing was compared; else 0."""
    if any(f.broken or f.verdict == "slower" for f in findings):
        return REGRESSION
    compared = [f for f in findings if f.verdict != "unmeasured"]
    if not compared or any(f.verdict == "ambiguous" for f in compared):
        return INCONCLUSIVE
    return NO_REGRESSION


HEADLINES = {
    NO_REGRESSION: "No regression",
    REGRESSION: "Regression",
    INCONCLUSIVE: "Inconclusive: nothing got worse for certain, and not everything is certain",
}


def to_markdown(
    findings: Sequence[Finding], thresholds: Thresholds, *, title: str, notes: Sequence[str] = (), verdict: bool = True
) -> str:
    """A summary: headline, a table with what changed first, and how it was judged.

    Args:
        findings: By `compare_rows`.
        thresholds: What they were judged by.
        title: What was compared.
        notes: Lines below the table: machine, versions, marks.
        verdict: Whether the headline says what the findings add up to.
    """
    unmeasured = sum(f.verdict == "unmeasured" for f in findings)
    headline = "Nothing was measured" if unmeasured == len(findings) else HEADLINES[exit_status(findings)]
    lines = [f"## {f'{headline}: ' if verdict else ''}{cell(title)}", ""]
    if findings:
        several = len({finding.machine for finding in findings}) > 1
        together = "95% together" if thresholds.looks > 1 else "95%"
        lines += [f"| case | | base | change | change / base ({together}) | launches | verdict |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
        rank = {"slower": 1, "ambiguous": 2, "unmeasured": 3, "faster": 4, "same": 5}
        lines += [_line(f, several) for f in sorted(findings, key=lambda f: 0 if f.broken else rank[f.verdict])]
    lines += ["", f"Time counts from {thresholds.least_time:.1%}, memory from {thresholds.memory:.1%}."]
    if thresholds.noise is not None:
        lines[-1] += f" The runner's noise floor is {thresholds.noise:.2%}."
    else:
        lines[-1] += " The runner's noise floor was not given."
    if thresholds.looks > 1:
        lines.append(
            f"- each interval holds in {thresholds.confidence:.2%}: {thresholds.looks} looks share the 5% of error"
        )
    if unmeasured:
        lines.append(f"- cases that could not be compared, and count for nothing: {unmeasured}")
    lines += [f"- {cell(note)}" for note in notes]
    return "\n".join(lines) + "\n"


def _line(finding: Finding, several_machines: bool) -> str:
    def figure(x: float | None) -> str:
        if x is None:
            return ""
        return f"{x:.4g} ms" if finding.metric == "time" else f"{x / 2**30:.3f} GiB"

    i = finding.interval
    ratio = "" if finding.ratio is None else f"{finding.ratio:.4f}" + (f" [{i.low:.4f}, {i.high:.4f}]" if i else "")
    verdict = "**broken**" if finding.broken else WORDS[finding.metric].get(finding.verdict, finding.verdict)
    note = f": {cell(finding.note)}" if finding.note else ""
    launches = f"{finding.launches[0]} + {finding.launches[1]}" if any(finding.launches) else ""
    where = cell(finding.case.describe()) + (f", {cell(finding.machine)}" if several_machines else "")
    return (
        f"| {where} | {finding.metric} | {figure(finding.base)} | {figure(finding.change)} | "
        f"{ratio} | {launches} | {verdict}{note} |"
    )


def marks_of(*sides: Iterable[Measured]) -> list[str]:
    """One line a mark, with the number of rows that carry it, of those that count."""
    counts: dict[str, int] = {}
    for side in sides:
        for row in newest(side).rows:
            for mark in row.marks:
                counts[mark] = counts.get(mark, 0) + 1
    return [f"{count} launches are marked {mark}" for mark, count in sorted(counts.items())]
