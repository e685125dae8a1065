"""What became of a claim, and how a measured number is held against a said one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bench.store.rows import Row
from reports.series import DOUBTS, doubts

Verdict = Literal["holds", "holds in part", "not told apart", "does not hold", "not measured"]
"""``holds in part``: of several, some hold; or part of the interval lies where it would. ``not told apart``: of two
that are compared, either may be the better one."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim's line of the report.

    Attributes:
        id, source, said: The claim's.
        verdict: Whether it holds.
        measured: In words, with a unit; empty where nothing was.
        interval: Between which ends the measured number lies, in its own unit; None without one.
        command: What measures it again.
        judging: What judges what the command measured, of this claim alone; empty where a claim's own command does all.
        again: What gives this verdict once more, from the rows that it is of; empty without rows.
        notes: Which rows it is read from, and what to know of them.
    """

    id: str
    source: str
    said: str
    verdict: Verdict
    measured: str = ""
    interval: tuple[float, float] | None = None
    command: str = ""
    judging: str = ""
    again: str = ""
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> str:
        """What measures it and judges it, as one line for a shell."""
        return both(self.command, self.judging)

    def record(self) -> Mapping[str, Any]:
        """As JSON has it, notes as one text."""
        ends = None if self.interval is None else [_short(end) for end in self.interval]
        return {
            "id": self.id,
            "source": self.source,
            "said": self.said,
            "measured": self.measured or None,
            "interval": ends,
            "verdict": self.verdict,
            "command": self.command,
            "judging": self.judging,
            "again": self.again,
            "notes": "; ".join(self.notes),
        }


def both(command: str, judging: str) -> str:
    """Two commands as one line for a shell, the second where the first went well; either may be empty."""
    return " && ".join(filter(None, (command, judging)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def half_digit(text: str) -> float:
    """Half a unit of the last digit that is printed: 0.05 of ``2.5``, 0.5 of ``94``."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def same_as_printed(measured: float, text: str) -> bool:
    """Whether a number, rounded as far as ``text`` is, is what stands there."""
    # A shade more than half a digit: which way a tie goes depends on who rounded.
    return abs(measured - float(text)) <= half_digit(text) * (1 + 1e-9)


def _within(low: float, high: float, least: float, most: float) -> Verdict:
    """Whether what lies from low to high lies from least to most: all of it, none, or some."""
    if least <= low and high <= most:
        return "holds"
    return "does not hold" if high < least or most < low else "holds in part"


def at_least(low: float, high: float, text: str) -> Verdict:
    """Whether a number between these ends is at least the printed one, to its digits."""
    return _within(low, high, float(text) - half_digit(text), math.inf)


def at_most(low: float, high: float, text: str) -> Verdict:
    """Whether it is at most the printed one, to its digits."""
    return _within(low, high, -math.inf, float(text) + half_digit(text))


def about(low: float, high: float, text: str, percent: float) -> Verdict:
    """Whether it is so close to the printed one, or equal to it in the digits that are printed."""
    value, room = float(text), max(abs(float(text)) * percent / 100, half_digit(text))
    return _within(low, high, value - room, value + room)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim of several parts."""
    found = set(verdicts)
    if not found or "not measured" in found:
        return "not measured"
    return found.pop() if len(found) == 1 else "holds in part"


def marks(rows: Iterable[Row]) -> list[str]:
    """A note for each mark that is a reason to doubt a row's times, with the rows that carry it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for mark in doubts(row):
            found.setdefault(f"{mark} ({DOUBTS[mark][1]})", []).append(row.case.describe())
    return [f"{mark}: {', '.join(dict.fromkeys(cases))}" for mark, cases in found.items()]
