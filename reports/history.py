"""``python -m reports.history RESULTS.jsonl... --case CASE``: a case over the commits that it was measured at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import matplotlib as mpl
import numpy as np
import typer

from bench.cases.case import Case, Device
from bench.cases.choices import GRAMMAR
from bench.messages import OneLineCommand, refuse, say
from bench.store.files import write_file
from bench.store.rows import ResultError, Row, read_results
from bench.store.selection import machine, newest
from bench.store.sheets import to_csv
from reports import drawing, layout
from reports.best import memory, time
from reports.cells import GIB, number
from reports.claims.errors import ClaimError
from reports.claims.ratio import ends_ms
from reports.claims.rows import check_written, of_steps
from reports.claims.subject import Subject
from reports.drawing import Line, Point
from reports.figures import Drawing
from reports.layout import Style
from reports.looks import Looks
from reports.refusing import refusing
from reports.series import doubts, span

Figure = Literal["time", "memory"]
LEAST_POINTS = 5
"""Fewer have no scatter of their own to hold a change against."""
PENALTY = 4.0
"""Of one change point, in variances times ln n. Of 300 series of 20 equal points with normal noise 5% then have one;
a step of six standard deviations is found in 95% of series within them, and in 90% at their last point."""
COMMIT_LETTERS = 7
LABEL_POINTS = 7.0
AXIS_LABEL_INCHES = 0.25
"""Of the room below an axis: here the commits' labels have it."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a case took at one commit.

    Attributes:
        commit: Its first letters, with a plus where there were uncommitted changes.
        started_at: Of its first launch, ISO 8601, UTC.
        value: Median over launches of each one's median milliseconds; or the largest peak, in GiB.
        low, high: Of several launches the fastest and the slowest; of one, the interval of its median.
        launches: With times.
        cards: On how many cards.
        marks: Reasons to doubt the times.
    """

    commit: str
    started_at: str
    value: float
    low: float
    high: float
    launches: int
    cards: int
    marks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """From which moment on another level holds, and by what factor it is above the one before.

    Attributes:
        index: The moment's.
        factor: Of the levels.
        step: Of the moment over the one before it.
    """

    index: int
    factor: float
    step: float

    @property
    def drifts(self) -> bool:
        """Whether the moment itself is not what changed: it is less than half of the way, as in a steady drift."""
        return math.log(self.step) / math.log(self.factor) < 0.5


def rows_of(text: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of a case, on the machine that has most of them; options that were not named may be anything.

    Raises:
        ResultError: There are none, or of several sets of options; the message lists what there is.
        ClaimError: The text names no case.
    """
    given = [row for row in rows if not row.case.parallel]
    found: list[Row] = []
    devices: tuple[Device, ...] = ("cuda", "cpu")
    for device in devices:
        try:
            subject = Subject.parse(text, device=device)
        except ValueError as error:
            if device == "cuda":
                raise ClaimError(f"--case {text!r:.200}: {error}") from None
            continue
        if subject.best or subject.every:
            raise ClaimError(f"--case {text!r:.200}: a case is {GRAMMAR}, as DiG-S/2:triton@1792:train")
        found = found or [row for row in given if _is(subject, row.case)]
    options = {row.case.options for row in found}
    if len(options) > 1:
        several = " or ".join(sorted({row.case.describe() for row in found}))
        raise ResultError(f"--case {text:.200}: it may be {several}; name the options")
    timed = [row for row in found if row.status == "ok"]
    if not timed:
        model = text.partition("@")[0].partition(":")[0]
        near = sorted({row.case.describe() for row in given if row.case.model == model and row.status == "ok"})
        have = f"; of {model} there are {', '.join(near[:6])}" if near else ""
        raise ResultError(f"no row of {text:.200} has a time{have}")
    machines = [machine(row) for row in timed]
    where = max(dict.fromkeys(machines), key=machines.count)
    return [row for row in timed if machine(row) == where]


def _is(subject: Subject, case: Case) -> bool:
    own = subject.case
    return set(subject.options) <= set(case.options) and all(
        getattr(case, name) == getattr(own, name)
        for name in (
            "model",
            "resolution",
            "batch",
            "mode",
            "precision",
            "device",
            "execution",
            "scope",
            "max_autotune",
        )
    )


def moments(rows: Iterable[Row], figure: Figure) -> list[Moment]:
    """A moment for each commit, in the order of time.

    Args:
        rows: Of one case on one machine, in any order; of a commit those count that `bench.store.selection.newest`
            chooses.
        figure: ``time`` or ``memory``.
    """
    commits: dict[tuple[str, bool], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.started_at):
        about = row.environment
        commits.setdefault((str(about.get("commit") or "unknown"), bool(about.get("dirty"))), []).append(row)
    found = []
    for (commit, dirty), own in commits.items():
        measured = [row for row in newest(own).rows if (time if figure == "time" else memory)(row)]
        if measured:
            found.append(_moment(f"{commit[:COMMIT_LETTERS]}{'+' if dirty else ''}", measured, figure))
    return found


def _moment(commit: str, rows: Sequence[Row], figure: Figure) -> Moment:
    if figure == "time":
        values = [row.median_ms or 0.0 for row in rows]
        ends = ends_ms(rows[0]) if len(rows) == 1 else (min(values), max(values))
    else:
        values = [(memory(row) or 0.0) / GIB for row in rows]
        ends = min(values), max(values)
    return Moment(
        commit=commit,
        started_at=rows[0].started_at,
        value=median(values) if figure == "time" else max(values),
        low=ends[0],
        high=ends[1],
        launches=len(rows),
        cards=len({row.environment.get("gpu_uuid") for row in rows}),
        marks=tuple(dict.fromkeys(mark for row in rows for mark in doubts(row))),
    )


def changes(values: Sequence[float], noise: float) -> list[Change]:
    """Where the level of a series changes, by PELT (Killick, Fearnhead and Eckley, J. Am. Statist. Assoc. 107, 2012).

    Squared distances of logarithms from each segment's mean, with `PENALTY` variances times ln n for a change. The
    standard deviation comes from the median distance of neighbours, which few changes leave as it is; it is not taken
    for less than half the noise floor, which is two of them.

    Args:
        values: Positive, in the order of time; fewer than `LEAST_POINTS` have no change points.
        noise: The machine's noise floor, as a share.

    Raises:
        ModuleNotFoundError: ruptures is not installed.
    """
    if len(values) < LEAST_POINTS:
        return []
    import ruptures

    logs = np.log(np.asarray(values, dtype=float))
    # Neighbours differ by √2 standard deviations; 0.6745 of one hold half of a normal law.
    scatter = float(np.median(np.abs(np.diff(logs)))) / 0.6745 / math.sqrt(2)
    penalty = PENALTY * max(scatter, noise / 2) ** 2 * math.log(len(logs))
    ends = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(logs[:, None]).predict(pen=penalty)
    parts = [logs[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [
        Change(index=end, factor=math.exp(after.mean() - before.mean()), step=math.exp(logs[end] - logs[end - 1]))
        for end, before, after in zip(ends, parts, parts[1:], strict=False)
    ]


def levels(values: Sequence[float], found: Sequence[Change]) -> list[float]:
    """The level at each moment: the geometric mean of its segment."""
    logs = np.log(np.asarray(values, dtype=float))
    edges = [0, *(change.index for change in found), len(values)]
    return [math.exp(logs[a:b].mean()) for a, b in pairwise(edges) for _ in range(a, b)]


def changed(found: Sequence[Moment], at: Sequence[Change]) -> list[str]:
    """A line for each change point, and one for each drift: no commit of a drift is to blame for it."""
    lines = []
    edges = [0, *(change.index for change in at), len(found)]
    runs = [list(own) for _, own in groupby(range(len(at)), key=lambda i: (at[i].drifts, at[i].factor > 1))]
    for own in runs:
        if not at[own[0]].drifts:
            lines += [f"changed by {at[i].factor - 1:+.1%} at {found[at[i].index].commit}" for i in own]
            continue
        factor = math.prod(at[i].factor for i in own)
        first, last = found[edges[own[0]]], found[edges[own[-1] + 2] - 1]
        lines.append(
            f"drifts by {factor - 1:+.1%} between {first.commit} and {last.commit}: no commit there makes half of it"
        )
    return lines


def draw(case: Case, where: str, found: Sequence[Moment], at: Sequence[Change], figure: Figure) -> Drawing:
    """The case over its commits, levels as steps, change points as dashed lines with what they changed."""
    look = Looks().of(case.family, case.options)
    label = case.describe()
    line = Line(
        label=label,
        style=Style(color=look.color, marker=look.marker, dashes="none", width=look.width),
        points=tuple(
            Point(x=float(i), y=moment.value, low=moment.low, high=moment.high) for i, moment in enumerate(found)
        ),
    )
    launches = span(moment.launches for moment in found)
    marked = sorted({mark for moment in found for mark in moment.marks})
    caption = (
        f"{where}. {len(found)} commits from {found[0].started_at[:10]} to {found[-1].started_at[:10]}, "
        f"in the order of measurement, {launches} launch{'' if launches == '1' else 'es'} each; bars are their range, "
        "or of one the interval of its median. Thin: the level between change points. A plus: uncommitted changes."
        + (f" Some are marked {', '.join(marked)}." if marked else "")
    )
    unit = "Milliseconds a step" if figure == "time" else "GiB"
    # Labels stand upright below the axis, where the caption's room is for lying ones.
    longest = max(layout.text_inches(moment.commit, LABEL_POINTS) for moment in found)
    with mpl.rc_context(dict(layout.RC)):
        shape, (axes,) = layout.assemble(
            1,
            title=f"{'Time' if figure == 'time' else 'Memory'} over commits",
            caption=caption,
            styles={label: look},
            below=max(longest - AXIS_LABEL_INCHES, 0.0),
        )
        drawing.draw_panel(
            axes,
            [line],
            title="",
            x_label="",
            y_label=f"{unit} (log axis)",
            x_ticks={float(i): moment.commit for i, moment in enumerate(found)},
            failures_at="top",
        )
        axes.tick_params(axis="x", labelrotation=90, labelsize=LABEL_POINTS)
        steps = levels([moment.value for moment in found], at)
        if len(found) >= LEAST_POINTS:  # Of fewer, no level is claimed.
            axes.step(
                range(len(steps)), steps, where="mid", color=layout.SOFT_INK, linewidth=0.9, zorder=2, gid="levels"
            )
        for change in at:
            x = change.index - 0.5
            axes.axvline(x, color=layout.INK, linestyle="--", linewidth=0.9, gid=f"change:{change.index}")
            axes.annotate(
                f"{change.factor - 1:+.1%}", (x, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -9),
                textcoords="offset points", fontsize=8, color=layout.INK,
            )  # fmt: skip
    return Drawing(figure=shape)


def data(found: Sequence[Moment], at: Sequence[Change], figure: Figure) -> str:
    """The figure's numbers as CSV, a line a commit."""
    unit = "ms" if figure == "time" else "gib"
    factors = {change.index: change.factor for change in at}
    lines: list[list[object]] = []
    for index, (moment, level) in enumerate(zip(found, levels([m.value for m in found], at), strict=True)):
        changed = f"{100 * (factors[index] - 1):.2f}" if index in factors else ""
        numbers = [f"{x:.6g}" for x in (moment.value, moment.low, moment.high)]
        marks = " ".join(moment.marks)
        lines.append(
            [moment.commit, moment.started_at, *numbers, moment.launches, moment.cards, marks, f"{level:.6g}", changed]
        )
    names = ("commit", "started_at", unit, "low", "high", "launches", "cards", "marks", "level", "change_percent")
    return to_csv(names, lines)


@app.command(cls=OneLineCommand)
def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.jsonl", help="Results files that hold rows of several commits.")
    ],
    case: Annotated[
        str,
        typer.Option(
            metavar="CASE", help="As bench regression takes it: DiG-S/2:triton@1792:train. Options left out may be any."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for history.png, .svg and .csv.")] = Path(
        "out/history"
    ),
    figure: Annotated[str, typer.Option(help="time or memory.")] = "time",
    noise: Annotated[
        float,
        typer.Option(help="The machine's noise floor in percent: less than that is no change, however quiet the rows."),
    ] = 0.5,
) -> None:
    """Draw one case over the commits whose rows are in the files, in the order of time, and mark where it changed.

    Prints the change points. Cards of one name differ by a few percent; the data say on how many each commit ran.

    Exit status 2: a file cannot be read or written, or holds no row of the case.
    """
    if figure not in ("time", "memory"):
        refuse(f"--figure must be time or memory; got {figure[:80]!r}")
    if not 0 < noise < 100:
        refuse(f"--noise must be a percentage above 0 and below 100; got {noise:g}")
    what: Figure = "time" if figure == "time" else "memory"
    with refusing(ResultError, ClaimError, folder=out, hint="; choose another --out"):
        for path in files:
            check_written(path)
        steps = [path for path in files if of_steps(path)]
        given = [row for path in steps for row in read_results(path).rows]
        rows = rows_of(case, given)
        found = moments(rows, what)
        if not found:
            raise ResultError(f"no row of {case:.200} has a memory peak")
        try:
            at = changes([moment.value for moment in found], noise / 100)
        except ModuleNotFoundError:
            refuse("change points need ruptures: pip install -e '.[report]'")
        where = machine(rows[0])
        drawing_ = draw(rows[0].case, where, found, at, what)
        out.mkdir(parents=True, exist_ok=True)
        written = drawing_.save(out, "history")
        write_file(out / "history.csv", data(found, at, what))
    unit = "ms" if what == "time" else "GiB"
    say(f"{rows[0].case.describe()} on {where}: {len(found)} commits")
    others = Counter(
        machine(row) for row in given if row.case == rows[0].case and row.status == "ok" and machine(row) != where
    )
    for other, count in others.items():
        say(f"left out: {count} rows on {other}; give files of that machine alone to draw them")
    for moment in found:
        say(f"  {moment.started_at[:16]} {moment.commit:8} {number(moment.value)} {unit}")
    for line in changed(found, at):
        say(line)
    if len(found) < LEAST_POINTS:
        say(f"no change points: they take {LEAST_POINTS} commits")
    elif not at:
        say("no change points")
    for path in [*written, out / "history.csv"]:
        say(f"wrote {path}")


if __name__ == "__main__":
    app(prog_name="python -m reports.history")
