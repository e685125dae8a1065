"""One number by a query: a case's time or memory, a log's last line, a count. What prose's numbers are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.sampling.rows import read_rows
from bench.store.decoding import parse_json
from bench.store.files import read_file
from bench.store.rows import Row, read_results
from dig.registry import PATCHES, find_family
from reports.best import failure, memory, time
from reports.cells import GIB
from reports.claims.counts import counts_of
from reports.claims.errors import ClaimError
from reports.claims.ratio import FIGURES, Figure
from reports.claims.rows import ROWS, Files, Source
from reports.claims.subject import Subject

LETTERS = {"throttled": "ᵗ", "unsteady": "ᵘ", "not-rechecked": "ᶜ"}
"""What pages write after the time of a row with this mark."""
OF_CASE: Mapping[str, Callable[[Row], float | None]] = {
    "": time,
    "memory": lambda row: (memory(row) or 0) / GIB,
    "ceiling": lambda row: 100 * (row.ceiling_share or 0),
}
LAUNCHES: Mapping[str, Callable[[Iterable[tuple[float, Row]]], tuple[float, Row]]] = {
    f"{word} launch": partial(choose, key=itemgetter(0)) for word, choose in (("fastest", min), ("slowest", max))
}
OF, THAN, WITHIN = " of ", " than ", " in "


def measured(query: str, rows: str, files: Files) -> tuple[float, str]:
    """What a query gives, and the letters of its row's marks.

    ======================================  =======================================================================
    ``CASE``, ``best CASE``                 its milliseconds (`reports.claims.subject.Subject`)
    ``memory of CASE``                      its peak in GiB
    ``ceiling of CASE``                     percent of the matrix products' ceiling that it reaches
    ``fastest launch of CASE``              the milliseconds of one of a file's launches of it; ``slowest`` likewise
    ``last slower of CASES than CASES``     the largest resolution up to which the first takes longer; ``@*`` in both
    ``first leaner of CASES than CASES``    the resolution from which on the first takes less memory
    ``lead of CASE than CASE``              the second's time over the first's
    ``cases of FILE``                       how many cases it has
    ``minutes of FILE``                     from its first row's start to its last row's end
    ``gmac of MODEL``                       multiply-adds of an image of 256 pixels
    ``least share of FAMILY than FAMILY``   percent of the other's multiply-adds, over all sizes and patches
    ``largest share of FAMILY than FAMILY`` likewise
    ``samples of MODEL@RESOLUTION``         its median of samples a second, of rows of `bench sampling`; where a file
                                            has several of a model, ``MODEL:BACKEND@RESOLUTION``
    ``most FIELD of FILE``                  of the probes of `bench capacity` that fit
    ``FIELD of FOLDER/FILE.jsonl``          of the last line of a log beside the rows
    ======================================  =======================================================================

    Args:
        query: One of these; `` in FILE`` at its end names another results file.
        rows: Name of the results file of cases.
        files: The rows.

    Raises:
        ClaimError: There is no such number.
        ResultError: A file cannot be read.
    """
    words, _, other = query.partition(WITHIN)
    name, _, thing = words.rpartition(OF)
    try:
        if name in LAUNCHES:
            return _of_launches(Subject.parse(thing), ROWS / (other or rows), LAUNCHES[name])
        if name not in OF_CASE:
            return _counted(name, thing, other or rows, files), ""
        return _of_case(Subject.parse(thing), other or rows, name, files)
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, ClaimError):
            raise
        raise ClaimError(f"{query!r}: {error}") from None


def _of_case(subject: Subject, rows: str, name: str, files: Files) -> tuple[float, str]:
    row = _source(rows, files).find(subject, "memory" if name == "memory" else "time")
    value = OF_CASE[name](row) if row is not None else None
    if row is None or not value:
        why = failure(row) if row is not None and row.status != "ok" else "nothing"
        raise ClaimError(f"{subject.name} at {subject.case.resolution} in {rows}: {why}")
    return value, "" if name else _letters(row)


def _letters(row: Row) -> str:
    return "".join(letter for mark, letter in LETTERS.items() if mark in row.marks)


def _of_launches(
    subject: Subject, path: Path, choose: Callable[[Iterable[tuple[float, Row]]], tuple[float, Row]]
) -> tuple[float, str]:
    launches = [(ms, row) for row in subject.of(read_results(path).rows) if (ms := time(row)) is not None]
    if len(launches) < 2:
        raise ClaimError(f"{path.name} has {len(launches)} launches of {subject.name}, not several")
    value, row = choose(launches)
    return value, _letters(row)


def _source(rows: str, files: Files) -> Source:
    source = files.source(rows)
    if source is None:
        raise ClaimError(f"no file {rows!r} of rows")
    return source


def _counted(name: str, thing: str, rows: str, files: Files) -> float:
    first, _, second = thing.partition(THAN)
    match name:
        case "cases":
            return len({row.case for row in _source(thing, files).rows})
        case "minutes":
            return _minutes(files.paths(thing)[0])
        case "gmac":
            return counts_of(thing).macs / 1e9
        case "least share" | "largest share":
            return (min if name.startswith("least") else max)(_shares(first, second))
        case "last slower":
            return _sides(first, second, _source(rows, files), "time")[0]
        case "first leaner":
            return _sides(first, second, _source(rows, files), "memory")[1]
        case "lead":
            own, other = (_of_case(Subject.parse(case), rows, "", files)[0] for case in (first, second))
            return other / own
        case "samples":
            return _samples(thing, ROWS / rows)
        case "most batch" | "most resolution":
            return max(line[name.removeprefix("most ")] for line in _lines(ROWS / thing) if line["fits"])
    return float(_lines(ROWS / thing)[-1][name])


def _samples(thing: str, path: Path) -> float:
    """Samples a second of the file's only row of a model, with its backend or without, and a resolution."""
    model, _, resolution = thing.partition("@")
    name, _, backend = model.partition(":")
    found = [
        row.speed.median
        for row in read_rows(path).rows
        if (row.case.model, str(row.case.resolution)) == (name, resolution) and row.speed is not None
        if not backend or dict(row.case.options).get("backend") == backend
    ]
    if len(found) != 1:
        raise ClaimError(f"{path.name} has {len(found)} speeds of {thing}, not one")
    return found[0]


def _minutes(path: Path) -> float:
    rows = sorted(read_results(path).rows, key=lambda row: row.started_at)
    first, last = (datetime.fromisoformat(row.started_at) for row in (rows[0], rows[-1]))
    return ((last - first).total_seconds() + sum(rows[-1].seconds.values())) / 60


def _shares(family: str, peer: str) -> list[float]:
    """Percent of the peer's multiply-adds, of every size and patch."""
    return [
        100 * counts_of(f"{family}-{size}/{patch}").macs / counts_of(f"{peer}-{size}/{patch}").macs
        for size in find_family(family).sizes
        for patch in PATCHES
    ]


def _sides(ours: str, peer: str, source: Source, figure: Figure) -> tuple[int, int]:
    """The largest resolution up to which ours takes more everywhere, and the least from which on it takes less."""
    subjects = [Subject.parse(text) for text in (ours, peer)]
    less = {}
    for size in sorted({row.case.resolution for row in subjects[0].of(source.rows)}):
        own, other = (source.find(subject.at(size), figure) for subject in subjects)
        values = [FIGURES[figure](row) if row is not None else None for row in (own, other)]
        if values[0] and values[1]:
            less[size] = values[0] < values[1]
    sizes = list(less)
    before = next((at for at, size in enumerate(sizes) if less[size]), len(sizes))
    after = next((at for at in range(len(sizes), 0, -1) if not less[sizes[at - 1]]), 0)
    if before == 0 or after == len(sizes):
        raise ClaimError(f"{subjects[0].name} and {subjects[1].name} do not change places: {less}")
    return sizes[before - 1], sizes[after]


def _lines(path: Path) -> list[Any]:
    try:
        return [parse_json(line) for line in read_file(path).decode().splitlines()]
    except OSError as error:
        raise ClaimError(f"cannot read {path}: {error.strerror}") from None
