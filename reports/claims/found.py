"""What the rows say of a claim: the number measured, its interval, the verdict, and the command that measures it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.store.lines import ResultError
from bench.store.rows import Row
from reports.ablation import Order, orders, read_ablation
from reports.cells import number
from reports.claims.curves import Between, Crossover, crossover, ratio
from reports.claims.said import Pattern, Statement
from reports.logs import RunError
from reports.page.commands import line, run_command
from reports.series import MODE_NAMES, doubts, read_sweep

ABLATION = "ablation.jsonl"
ABLATE = "python examples/ablation.py fashion-mnist out/ablation"
HOLDS, FAILS, PART, OPEN, UNMEASURED = "holds", "does not hold", "holds in part", "open", "not measured"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim and what became of it; the fields are those that the page reads.

    Attributes:
        id: The claim's.
        source: The claim's.
        said: The claim's.
        measured: The number, in words.
        interval: Its ends; None without one.
        verdict: One of those above.
        command: What measures it again.
        notes: What else to know: what was compared, marks of the rows.
    """

    id: str
    source: str
    said: str
    measured: str = ""
    interval: tuple[float, float] | None = None
    verdict: str = UNMEASURED
    command: str = ""
    notes: str = ""


class Evidence:
    """Rows of a folder, read once each.

    Args:
        folder: Holds ``rows.jsonl`` and others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, tuple[Row, ...]] = {}
        self._orders: dict[str, dict[str, list[Order]]] | None = None

    def rows(self, name: str) -> tuple[Row, ...]:
        """Rows of a file, the newest of each case, several launches as one; none where there is no such file."""
        if name not in self._rows:
            path = self.folder / name
            self._rows[name] = tuple(read_sweep([path]).rows) if path.exists() else ()
        return self._rows[name]

    def best(self, name: str, pattern: Pattern, figure: Callable[[Row], float | None]) -> Row | None:
        """Of the rows that a name means, the one with the least figure."""
        fitting = [row for row in self.rows(name) if row.status == "ok" and pattern.fits(row.case)]
        found = [(value, row) for row in fitting if (value := figure(row)) is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def by_resolution(self, name: str, pattern: Pattern) -> dict[int, Row]:
        """The fastest row of each resolution that a name means."""
        sides = sorted({row.case.resolution for row in self.rows(name) if pattern.fits(row.case)})
        each = {side: self.best(name, dataclasses.replace(pattern, resolution=side), milliseconds) for side in sides}
        return {side: row for side, row in each.items() if row is not None}

    def ablation(self, measure: str) -> dict[str, list[Order]]:
        """Orders of the ablation's arms by a measure; empty where it was not run. Raises ResultError."""
        if self._orders is None:
            path = self.folder / ABLATION
            try:
                runs = read_ablation(path) if path.exists() else []
                self._orders = {name: orders(runs, name) for name in ("frechet", "loss")}
            except RunError as error:
                raise ResultError(str(error)) from None
        return self._orders[measure]


def milliseconds(row: Row) -> float | None:
    """Median milliseconds of a step."""
    return row.median_ms


def peak(row: Row) -> float | None:
    """Bytes at the peak."""
    return None if row.memory is None else row.memory.peak


def find(statement: Statement, evidence: Evidence) -> Finding:
    """What the rows say of a claim. Raises ResultError where a file can't be read."""
    finder = {"ratio": _ratio, "crossover": _crossover, "count": _count, "order": _order}[statement.kind]
    found = finder(statement, evidence)
    notes = " ".join(filter(None, (found.pop("notes", ""), statement.notes)))
    return Finding(id=statement.id, source=statement.source, said=_sentence(statement), **found, notes=notes)


def _sentence(statement: Statement) -> str:
    """What was said; a row of a table, which is none, in a sentence."""
    if not statement.said.startswith("|"):
        return statement.said
    of, than = (Pattern.parse(text) for text in (statement.of, statement.than))
    mode = next(MODE_NAMES[word] for word in sorted(of.words) if word in MODE_NAMES)
    return (
        f"{of.model}'s lead over the best {than.model.rpartition('-')[0]} in a {mode} at {of.resolution}, batch "
        f"{of.batch}, is {statement.quoted} (table)."
    )


def _formed(value: float, form: str) -> float:
    """Of a ratio than over of: itself, the share that is spared, or the share that it takes more."""
    return {"times": value, "saving": 1 - 1 / value, "behind": 1 / value - 1}[form]


def _shown(value: float, form: str) -> str:
    return f"{number(value)} times" if form == "times" else f"{100 * value:.1f}%"


def _ratio(statement: Statement, evidence: Evidence) -> dict[str, Any]:
    figure = milliseconds if statement.figure == "time" else peak
    patterns = Pattern.parse(statement.of), Pattern.parse(statement.than)
    of, than = (evidence.best(statement.rows, pattern, figure) for pattern in patterns)
    if of is None or than is None:
        missing = patterns[0] if of is None else patterns[1]
        return {"command": _suite(statement.rows), "notes": f"No row of {missing.text} in {statement.rows}."}
    found = _between(of, than, statement)
    ends = None
    if found.low is not None and found.high is not None:
        scale = 1 if statement.form == "times" else 100
        ends = (scale * found.low, scale * found.high)
    verdict = _quoted(statement, found.value) if statement.quoted else _at_least(statement.value or 0, found)
    notes = f"{_named(of)} beside {_named(than)}."
    if statement.beside:
        name, _, text = statement.beside.partition("=")
        other = evidence.best(statement.rows, Pattern.parse(text), figure)
        if other is not None:
            value = _between(other, than, statement)
            notes += f" {name}: {_shown(value.value, statement.form)}."
    return {
        "measured": _shown(found.value, statement.form), "interval": ends, "verdict": verdict,
        "command": command_of([of, than]), "notes": notes,
    }  # fmt: skip


def _between(of: Row, than: Row, statement: Statement) -> Between:
    if statement.figure == "memory":
        return Between(value=_formed((peak(than) or 0) / (peak(of) or 1), statement.form))
    found = ratio(of, than)
    assert found.low is not None
    assert found.high is not None
    ends = sorted(_formed(value, statement.form) for value in (found.low, found.high))
    return Between(value=_formed(found.value, statement.form), low=ends[0], high=ends[1])


def _at_least(value: float, found: Between) -> str:
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return HOLDS if low >= value else FAILS if high < value else OPEN


def _quoted(statement: Statement, value: float) -> str:
    """Whether the rows give the printed number, to its digits."""
    return HOLDS if printed(value, statement.quoted, statement.form) == statement.quoted else FAILS


def printed(value: float, like: str, form: str = "times") -> str:
    """A number as it is printed: with as many digits behind the point as another has, in percent if that is."""
    percent = "%" if like.endswith("%") else ""
    scaled = 100 * value if form != "times" else value
    digits = len(like.rstrip("%").partition(".")[2])
    return f"{scaled:.{digits}f}{percent}"


def _named(row: Row) -> str:
    case = row.case
    options = ", ".join(value for _, value in case.options)
    peak_gib = "" if row.memory is None or row.memory.peak is None else f", {number(row.memory.peak / 2**30)} GiB"
    marks = "".join(f", {mark}" for mark in doubts(row))
    return f"{case.model} ({options}; {case.execution}{f' by {case.scope}' if case.scope else ''}): " + (
        f"{number(row.median_ms or 0)} ms{peak_gib}{marks}"
    )


def command_of(rows: Iterable[Row]) -> str:
    """One command that measures these cases again, or several, joined, where their axes would make others."""
    cases = list(dict.fromkeys(row.case for row in rows))
    return " && ".join(dict.fromkeys(run_command([case]) for case in cases))


def _suite(rows: str) -> str:
    suites = {"rows.jsonl": "paper", "best.jsonl": "best"}
    return line("run", "--suite", suites[rows], "--resume") if rows in suites else line("run", "--help")


def _crossover(statement: Statement, evidence: Evidence) -> dict[str, Any]:
    of, than = (evidence.by_resolution(statement.rows, Pattern.parse(text)) for text in (statement.of, statement.than))
    found = crossover(of, than)
    if found is None:
        return {"command": _suite(statement.rows)}
    shown = {
        "measured": in_words(found),
        "command": _suite(statement.rows),
        "notes": f"{statement.of} beside {statement.than}, at {', '.join(map(str, found.resolutions))} pixels.",
    }
    if found.side is None:
        return {**shown, "verdict": FAILS if statement.quoted else HOLDS}
    side = found.side
    ends = None if side.low is None or side.high is None else (side.low, side.high)
    rounded = f"{float(f'{side.value:.2g}'):.0f}"
    return {**shown, "interval": ends, "verdict": HOLDS if rounded == statement.quoted else FAILS}


def in_words(found: Crossover) -> str:
    """``from 1290 pixels on``, or what there is instead."""
    return found.words if found.side is None else f"from {found.side.value:.0f} pixels on"


def _count(statement: Statement, evidence: Evidence) -> dict[str, Any]:
    counts: Mapping[str, Sequence[float]] = statement.counts or {}
    off = {name: abs(counted - said) / said for name, (said, counted) in counts.items()}
    shown = ", ".join(f"{name} {said:g} ({counted:g})" for name, (said, counted) in counts.items())
    worst = max(off.values())
    return {
        "measured": f"said (counted): {shown}", "verdict": HOLDS if worst < 0.005 else FAILS,
        "command": line("list", "DiG", "--count"),
        "notes": f"Furthest apart: {100 * worst:.2f}%; half a percent is allowed for printed digits.",
    }  # fmt: skip


def _order(statement: Statement, evidence: Evidence) -> dict[str, Any]:
    by_distance, by_loss = (evidence.ablation(measure)[statement.group] for measure in ("frechet", "loss"))
    if not by_distance:
        return {"command": ABLATE}
    told = [f"{order.better} better than {order.worse}: {order.verdict}" for order in by_distance]
    verdicts = {order.verdict for order in by_distance}
    verdict = HOLDS if verdicts == {"holds"} else PART if "holds" in verdicts else FAILS
    if verdict == FAILS and "reversed" not in verdicts:
        verdict = OPEN
    loss = sum(order.verdict == "holds" for order in by_loss)
    return {
        "measured": "; ".join(told), "verdict": verdict, "command": ABLATE,
        "notes": f"By the Fréchet distance. By the loss {loss} of {len(by_loss)} orders hold.",
    }  # fmt: skip


def growing(rows: Mapping[int, Row], figure: Callable[[Row], float | None], least: int) -> dict[int, float]:
    """A figure by resolution, from one on."""
    found = {side: figure(row) for side, row in rows.items() if side >= least}
    return {side: value for side, value in found.items() if value is not None and math.isfinite(value)}


def within_step(row: Row) -> float | None:
    """Bytes that live within a step: the peak less weights and moments, which no token adds to."""
    return None if row.memory is None else row.memory.activations
