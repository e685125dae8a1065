"""A ratio that somebody claims, held against the rows of its two cases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from bench.judge.statistics import Interval
from bench.store.rows import Row
from reports.best import ATTENTION_NAMES, failure
from reports.cells import GIB, number
from reports.claims.commands import measuring_each, measuring_subjects
from reports.claims.declared import rewritten
from reports.claims.finding import (
    Finding,
    Verdict,
    about,
    at_least,
    at_most,
    marks,
    same_as_printed,
)
from reports.claims.numbers import LETTERS
from reports.claims.prose import HOLE
from reports.claims.ratio import FIGURES, Figure, ratio_of
from reports.claims.readme import LEAD, Section
from reports.claims.rows import Files, Source
from reports.claims.spec import Form, Ratio
from reports.claims.subject import Subject
from reports.series import Launches

FORMS: Mapping[Form, Callable[[float], float]] = {
    "times": lambda ratio: ratio,
    "percent more": lambda ratio: 100 * (ratio - 1),
    "percent less": lambda ratio: 100 * (1 - ratio),
}


def said_by_readme(claim: Ratio, readme: Section) -> tuple[str, str]:
    """The sentence, and the number in it.

    Raises:
        ClaimError: README says no such thing.
    """
    if claim.quote:
        text = readme.quoted(claim.quote)[1]
        return (claim.said or claim.quote).replace(HOLE, text), text
    line = readme.line(*claim.line)
    said = claim.said or f"{' · '.join(claim.line)}: a lead of {HOLE} times"
    return said.replace(HOLE, line[LEAD]), line[LEAD]


def judge_ratio(claim: Ratio, files: Files, readme: Section) -> Finding:
    """The verdict on a ratio.

    Raises:
        ClaimError: README doesn't say what it is said to.
        ResultError: A file cannot be read.
    """
    said, text = said_by_readme(claim, readme) if claim.finds_its_words else (claim.said, claim.value)
    value = claim.value or text
    subjects, source = subjects_of(claim), files.source(claim.rows)
    over, under, ratio = _compared(claim, source)
    if source is None or over is None or under is None or ratio is None:
        pairs = zip(subjects, (over, under), strict=True)
        notes = [_absent(subject, row, source, claim.rows) for subject, row in pairs]
        return Finding(
            id=claim.id, source=claim.source, said=said, verdict="not measured",
            command=claim.command or measuring_subjects(subjects), notes=tuple(filter(None, notes)),
        )  # fmt: skip
    form = FORMS[claim.form]
    measured = form(ratio.ratio)
    low, high = sorted((form(ratio.low), form(ratio.high)))
    notes = [f"{source.name}: {_described(over, claim.figure)} over {_described(under, claim.figure)}", *source.notes]
    verdict = _verdict(claim, measured, low, high, value)
    if claim.finds_its_words and claim.value and claim.value != text:
        verdict, notes = "does not hold", [*notes, f"README gives it as {text}, which was said to be {claim.value}"]
    if claim.line and (wrong := wrong_cells(readme.line(*claim.line), subjects[0], subjects[1], source)):
        verdict, notes = "does not hold", [*notes, *wrong]
    return Finding(
        id=claim.id,
        source=claim.source,
        said=said,
        verdict=verdict,
        measured=f"{number(measured)}{' times' if claim.form == 'times' else '%'}",
        interval=(low, high),
        command=claim.command or measuring_each([over.case, under.case]),
        notes=(*notes, *(marks((over, under)) if claim.figure == "time" else ())),
    )


def subjects_of(claim: Ratio) -> tuple[Subject, Subject]:
    """What is divided, and by what."""
    return Subject.parse(claim.over), Subject.parse(claim.under)


def _compared(claim: Ratio, source: Source | None) -> tuple[Row | None, Row | None, Interval | None]:
    """The rows of both, and their ratio where both have a figure."""
    over, under = (None if source is None else source.find(one, claim.figure) for one in subjects_of(claim))
    return over, under, None if over is None or under is None else ratio_of(over, under, claim.figure)


def value_of(claim: Ratio, files: Files) -> float | None:
    """What the rows give for the number that a claim says; None where they have none.

    Raises:
        ResultError: A file cannot be read.
    """
    ratio = _compared(claim, files.source(claim.rows))[2]
    return None if ratio is None else FORMS[claim.form](ratio.ratio)


def _verdict(claim: Ratio, measured: float, low: float, high: float, value: str) -> Verdict:
    if claim.relation == "printed":
        return "holds" if same_as_printed(measured, value) else "does not hold"
    if claim.relation == "about":
        return about(low, high, value, claim.within)
    return (at_least if claim.relation == "at least" else at_most)(low, high, value)


def _described(row: Row, figure: Figure) -> str:
    value = FIGURES[figure](row) or 0
    many = f", {len(row.launch_ms)} launches" if isinstance(row, Launches) else ""
    shown = f"{number(value)} ms" if figure == "time" else f"{number(value / GIB)} GiB"
    return f"{row.case.describe()}, {shown}{many}"


def _absent(subject: Subject, row: Row | None, source: Source | None, rows: str) -> str:
    if row is not None and row.status != "ok":
        return f"{row.case.describe()}: {failure(row)}"
    if row is None:
        where = source.name if source is not None else rows
        return f"no row of {subject.name} at {subject.case.resolution} in {where}"
    return ""


_CELL = re.compile(r"\s*(\d+(?:\.\d+)?)[ᵗᵘᶜ]*( ms| GiB)?(?:, )?(.*)")
"""A number with its marks, its unit, and the rest."""


def cells_now(line: Mapping[str, str], peer: Subject, ours: Subject, source: Source) -> list[str]:
    """The cells of a line of leads beside the lead as the rows give them: equal to the line's where it is right.

    A number keeps the digits that are printed, or has three where it had three.

    Args:
        line: Its cells, after the first: DiG's time, the peer's time and way, the lead, both peaks (or no peaks).
        peer, ours: What it compares.
        source: The rows.

    Returns:
        Both times with marks and the peer's way; both peaks.
    """
    both, cells = (ours, peer), list(line.values())
    found = [_cell(subject, cell, source, "time") for subject, cell in zip(both, cells[1:3], strict=True)]
    for peaks in cells[4:]:
        parts = zip(both, peaks.split(", "), strict=True)
        found.append(", ".join(_cell(subject, text, source, "memory") for subject, text in parts))
    return found


def _cell(subject: Subject, cell: str, source: Source, figure: Figure) -> str:
    row = source.find(subject, figure)
    value = FIGURES[figure](row) if row is not None else None
    if row is None or not value:
        return "no row" if row is None else failure(row)
    printed = _CELL.match(cell)
    text, unit, rest = (printed[1], printed[2] or "", printed[3].strip()) if printed else ("1.00", "", "")
    if figure == "memory":
        return f"{rewritten(text, value / GIB)}{unit}"
    letters = "".join(sign for mark, sign in LETTERS.items() if mark in row.marks)
    way = _way(row) if subject.best else rest
    return f"{rewritten(text, value)}{letters}{unit}{f', {way}' if way else ''}"


def wrong_cells(line: Mapping[str, str], peer: Subject, ours: Subject, source: Source) -> list[str]:
    """What a line of leads says beside its lead that the rows don't; arguments as of `cells_now`."""
    said = [*list(line.values())[1:3], *list(line.values())[4:]]
    now = cells_now(line, peer, ours, source)
    return [f"README says {cell}, the rows {other}" for cell, other in zip(said, now, strict=True) if cell != other]


def _way(row: Row) -> str:
    """``FA4``; ``cuDNN, whole`` where the whole model was compiled."""
    names = [ATTENTION_NAMES.get(word, word) for _, word in row.case.options]
    return ", ".join([*names, *(["whole"] if row.case.scope == "model" else [])])
