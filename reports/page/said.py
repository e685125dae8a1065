"""What is said of rows under every chart: where numbers are from, what their intervals are, what they read as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from bench.store.rows import Row
from bench.store.selection import Placed, machine
from reports.cells import number
from reports.series import ASSUMED_NOTE, DOUBTS, Launches, bar_ms, doubts, is_assumed, launches_of, span

GIB = 2**30


class Told(Protocol):
    """What says where and when it was measured."""

    @property
    def case(self) -> Any:
        """What was measured."""

    @property
    def started_at(self) -> str:
        """ISO 8601."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Commit, versions, device."""


def commit(environment: Mapping[str, Any]) -> str:
    """Ten letters of the commit, ``+`` where changes were uncommitted; empty where nobody recorded it."""
    full = str(environment.get("commit") or "")
    return full[:10] + ("+" if full and environment.get("dirty") else "")


def provenance(rows: Sequence[Told], files: Iterable[str] = ()) -> str:
    """``NVIDIA H100 80GB HBM3 · torch 2.11.0 · commit a659891ad3 · 2026-11-26 · rows.jsonl``; of several values all."""
    parts = [" and ".join(dict.fromkeys(where(row) for row in rows))]
    for key, prefix in (("torch", "torch "), ("cuda", "CUDA "), ("triton", "Triton ")):
        values = dict.fromkeys(str(row.environment[key]) for row in rows if row.environment.get(key))
        parts += [prefix + " and ".join(values)] if values else []
    commits = dict.fromkeys(found for row in rows if (found := commit(row.environment)))
    parts += [f"commit {' and '.join(commits)}"] if commits else []
    dates = [row.started_at[:10] for row in rows if row.started_at]
    parts += [span(dates)] if dates else []
    names = " and ".join(dict.fromkeys(files))
    return " · ".join([*parts, *([names] if names else [])])


def where(row: Placed) -> str:
    """The machine; a processor's rows are no GPU's."""
    return f"{machine(row)} (CPU, not a GPU result)" if row.case.device == "cpu" else machine(row)


def intervals(rows: Sequence[Row]) -> str:
    """What points and bars are, of rows with times."""
    several = [row for row in rows if isinstance(row, Launches)]
    if not several:
        steps = span([len(row.samples_ms) for row in rows])
        return f"Points: median of {steps} steps of one process. Intervals: 10th to 90th percentile of steps."
    of_steps = "; of one launch, 10th to 90th percentile of its steps" if len(several) < len(rows) else ""
    return (
        f"Points: median over {span([launches_of(row) for row in rows])} process launches. Intervals: fastest to "
        f"slowest launch{of_steps}."
    )


def marked(rows: Iterable[Row]) -> list[str]:
    """Which marks of doubt rows carry, and whether a size is assumed."""
    given = list(rows)
    counts = Counter(mark for row in given for mark in doubts(row))
    lines = []
    if counts:
        named = ", ".join(f"{count} {mark} ({DOUBTS[mark][1]})" for mark, count in counts.items())
        lines.append(f"Marked, of {len(given)}: {named}.")
    if any(is_assumed(row.case) for row in given):
        lines.append(ASSUMED_NOTE)
    return lines


def time_words(row: Row) -> str:
    """``2.41 ms [2.40, 2.42]``."""
    low, high = bar_ms(row)
    return f"{number(row.median_ms or 0)} ms [{number(low)}, {number(high)}]"


def row_words(row: Row) -> str:
    """How it was run, what it took, and its marks, in a line."""
    parts = [time_words(row)] if row.status == "ok" else []
    peak = row.memory.peak if row.memory is not None else None
    parts += [f"{number(row.fps or 0)} images/s"] if row.status == "ok" else []
    parts += [f"{number(peak / GIB)} GiB"] if peak else []
    parts.append(f"{row.case.way}, {row.case.precision}, batch {row.case.batch}")
    parts += [", ".join(doubts(row))] if doubts(row) else []
    parts += [f"commit {found}"] if (found := commit(row.environment)) else []
    return " · ".join(parts)
