"""Times and memory against resolution: where two cases cross, and to which power of the tokens one grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.cases.suites import PAPER_RESOLUTIONS
from bench.store.rows import Row
from reports.best import failure
from reports.cells import number
from reports.claims.commands import measuring_each, measuring_subjects
from reports.claims.finding import Finding, Verdict, marks
from reports.claims.prose import HOLE
from reports.claims.ratio import FIGURES, Figure, ends_ms, ratio_of
from reports.claims.readme import Section
from reports.claims.rows import Files, Source
from reports.claims.spec import Crossover, Exponent
from reports.claims.subject import Subject

POINTS = 3
"""How many of the largest resolutions an exponent is taken over."""


def _resolutions(subject: Subject, source: Source) -> list[int]:
    return sorted({row.case.resolution for row in subject.of(source.rows)})


@dataclass(frozen=True, kw_only=True)
class Point:
    """Two cases at one resolution.

    Attributes:
        resolution: Pixels.
        rows: Ours and the peer's.
        lead, low, high: Logarithm of the peer's time over ours, and of its ends: above 0 ours is ahead. Infinite where
            one of them did not fit in memory and the other ran.
        note: Why one has no time.
    """

    resolution: int
    rows: tuple[Row, Row]
    lead: float
    low: float
    high: float
    note: str = ""


def points(ours: Subject, peer: Subject, source: Source) -> list[Point]:
    """Resolutions at which both were measured, or one of them did not fit in memory."""
    found = []
    for resolution in _resolutions(ours, source):
        own, other = (source.find(subject.at(resolution)) for subject in (ours, peer))
        if own is None or other is None:
            continue
        rows = (own, other)
        if ratio := ratio_of(other, own, "time"):
            ends = [math.log(x) for x in (ratio.ratio, ratio.low, ratio.high)]
            found.append(Point(resolution=resolution, rows=rows, lead=ends[0], low=ends[1], high=ends[2]))
        elif {own.status, other.status} == {"ok", "oom"}:
            lead = math.inf if own.status == "ok" else -math.inf
            name, row = (peer.name, other) if own.status == "ok" else (ours.name, own)
            note = f"{name} at {resolution}: {failure(row)}"
            found.append(Point(resolution=resolution, rows=rows, lead=lead, low=lead, high=lead, note=note))
    return found


def crossing(resolutions: Sequence[int], leads: Sequence[float]) -> float | None:
    """From which resolution on the lead stays above 0, interpolated over log tokens; None if it does not at the end.

    The smallest resolution where it is above 0 at all of them; the first one ahead where an end is infinite.

    Args:
        resolutions: Ascending, at least one.
        leads: Logarithms, one each.
    """
    if leads[-1] <= 0:
        return None
    behind = [index for index, lead in enumerate(leads) if lead <= 0]
    if not behind:
        return float(resolutions[0])
    index = behind[-1]
    if math.isinf(leads[index]) or math.isinf(leads[index + 1]):
        return float(resolutions[index + 1])
    # Tokens go with the resolution's square, so that logarithms of both interpolate alike.
    x0, x1 = math.log(resolutions[index]), math.log(resolutions[index + 1])
    share = -leads[index] / (leads[index + 1] - leads[index])
    return math.exp(x0 + share * (x1 - x0))


def judge_crossover(claim: Crossover, files: Files, readme: Section) -> Finding:
    """From where on ours is ahead: it holds where that is so at the largest resolution, with its whole interval.

    Where ours is behind at the largest that was measured, and that is not the paper's largest, nothing is known.

    Raises:
        ClaimError: README doesn't say what it is said to.
        ResultError: A file cannot be read.
    """
    ours, peer = Subject.parse(claim.ours), Subject.parse(claim.peer)
    source = files.source(claim.rows, *claim.also)
    found = points(ours, peer, source) if source is not None else []
    said = claim.said or f"{ours.name} overtakes {peer.name}"
    printed = ""
    if claim.quote:
        printed = readme.quoted(claim.quote)[1]
        said = (claim.said or claim.quote).replace(HOLE, printed)
    if source is None or not found:
        where = source.name if source is not None else claim.rows
        note = f"no resolution in {where} at which both have rows"
        return Finding(
            id=claim.id, source=claim.source, said=said, verdict="not measured",
            command=claim.command or measuring_subjects([ours, peer]), notes=(note,),
        )  # fmt: skip
    sizes = [point.resolution for point in found]
    middle, latest, earliest = (
        crossing(sizes, [getattr(point, end) for point in found]) for end in ("lead", "low", "high")
    )
    verdict: Verdict = "holds" if latest is not None else "holds in part" if middle is not None else "does not hold"
    leads = ", ".join(f"{point.resolution}: {_lead(point.lead)}" for point in found)
    notes = [f"{source.name}: the peer's time over ours at {leads}", *source.notes]
    notes += [point.note for point in found if point.note] + marks(row for point in found for row in point.rows)
    if printed and (middle is None or abs(middle - float(printed)) > _rounding(printed)):
        verdict = "does not hold"
    elif middle is None and sizes[-1] < PAPER_RESOLUTIONS[-1]:
        verdict = "not measured"
    elif len(sizes) == 1 and verdict == "holds":
        # At one resolution nothing is overtaken.
        verdict = "holds in part"
    ahead = middle == sizes[0]
    return Finding(
        id=claim.id,
        source=claim.source,
        said=said,
        verdict=verdict,
        measured=_said(middle, sizes),
        interval=None if ahead or earliest is None or latest is None else _around(earliest, latest, sizes),
        command=claim.command
        or (
            measuring_subjects([ours, peer])
            if verdict == "not measured"
            else _command(row for p in found for row in p.rows)
        ),
        notes=tuple(notes),
    )


def _lead(lead: float) -> str:
    if math.isinf(lead):
        return "alone" if lead > 0 else "ours not at all"
    return f"{math.exp(lead):.3g}"


def _command(rows: Iterable[Row]) -> str:
    """What measures just these again: of a set, the ways that were its fastest (or leanest)."""
    return measuring_each(row.case for row in rows)


def _rounding(text: str) -> float:
    """Half of what a resolution is rounded to, by its zeros: 50 of ``1300``."""
    return 0.5 * 10.0 ** (len(text) - len(text.rstrip("0")))


def _around(earliest: float, latest: float, sizes: Sequence[int]) -> tuple[float, float]:
    """The measured resolutions that the place surely lies between: how the times go from one to the next is not known.

    Args:
        earliest: Where it would be with every time at the end that favours ours.
        latest: With every one at the other end.
        sizes: Ascending.
    """
    return float(max((x for x in sizes if x < earliest), default=sizes[0])), float(min(x for x in sizes if x >= latest))


def _said(middle: float | None, sizes: Sequence[int]) -> str:
    if middle is None:
        return f"not ahead at {sizes[-1]}, the largest measured"
    if middle == sizes[0]:
        only = "the only one" if len(sizes) == 1 else "the smallest"
        return f"ahead from {sizes[0]} pixels, {only} measured"
    after = next(size for size in sizes if size >= middle)
    before = max(size for size in sizes if size < after)
    # Its last digits are not known: a straight line between the logarithms stands for what lies between.
    return f"ahead from about {round(middle, -1):.0f} pixels, interpolated between {before} and {after}"


def slope(tokens: Sequence[float], values: Sequence[float]) -> float:
    """Least squares' slope of log values over log tokens."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def slope_range(tokens: Sequence[float], ends: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The least and the largest slope between neighbours, each value at the worse end of its interval."""
    x = np.log(tokens)
    logs = np.log(np.asarray(ends))
    low, high = (logs[1:, i] - logs[:-1, 1 - i] for i in (0, 1))
    return float(np.min(low / np.diff(x))), float(np.max(high / np.diff(x)))


def judge_exponent(claim: Exponent, files: Files) -> Finding:
    """The power of the tokens that time or memory grows with; it holds where it is not above the theory's.

    From above it can't be reached at these sizes: what doesn't grow with the tokens (launches, weights) and what grows
    with a lesser power (products) still counts, and fades.

    Raises:
        ResultError: A file cannot be read.
    """
    subject = Subject.parse(claim.of)
    source = files.source(claim.rows)
    sizes = _resolutions(subject, source) if source is not None else []
    rows = [source.find(subject.at(size), claim.figure) for size in sizes] if source is not None else []
    timed = [row for row in rows if row is not None and FIGURES[claim.figure](row)][-POINTS:]
    said = claim.said or f"{claim.figure} of {subject.name} grows with tokens to the power {claim.theory:g}"
    if source is None or len(timed) < POINTS:
        note = f"it takes {POINTS} resolutions; {source.name if source else claim.rows} has {len(timed)}"
        return Finding(
            id=claim.id, source=claim.source, said=said, verdict="not measured",
            command=claim.command or measuring_subjects([subject]), notes=(note,),
        )  # fmt: skip
    sizes = [row.case.resolution for row in timed]
    tokens = [(size / 8 / subject.case.patch) ** 2 for size in sizes]
    values = [FIGURES[claim.figure](row) or 0.0 for row in timed]
    low, high = slope_range(tokens, [_ends(row, claim.figure) for row in timed])
    value = slope(tokens, values)
    room = claim.theory + 0.05
    verdict: Verdict = "holds" if high <= room else "does not hold" if low > room else "holds in part"
    notes = [f"{source.name}: {', '.join(map(str, sizes))} pixels", *source.notes]
    notes += marks(timed) if claim.figure == "time" else []
    return Finding(
        id=claim.id,
        source=claim.source,
        said=said,
        verdict=verdict,
        measured=f"to the power {number(value)}",
        interval=(low, high),
        command=claim.command or _command(timed),
        notes=tuple(notes),
    )


def _ends(row: Row, figure: Figure) -> tuple[float, float]:
    if figure == "time":
        return ends_ms(row, together=POINTS)
    peak = FIGURES[figure](row) or 0.0
    return peak, peak
