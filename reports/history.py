"""``python -m reports.history FILE... --case CASE --out DIR``: a case's time over the commits that have rows of it.

Change points are found by PELT with a squared cost on the logarithms of times (Killick et al., arXiv 1101.1438, as
`ruptures` has it), at a penalty of ``2 σ² log n``. σ is taken from differences of neighbours, of which most are noise:
their median's deviation, but at least half a percent, which is what one card differs from another by.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib as mpl
import typer

from bench.judge.history import commit_of
from bench.messages import OneLineCommand, say
from bench.store.files import write_file
from bench.store.lines import ResultError
from bench.store.rows import Row, read_results
from reports import drawing
from reports.cells import number
from reports.claims.said import Pattern
from reports.drawing import Line, Point
from reports.figures import Drawing
from reports.looks import Looks
from reports.refusing import refusing
from reports.series import bar_ms, merge_launches

LEAST_NOISE = 0.005
FEWEST = 3
"""Commits that change points take."""
NAME = 7
"""Letters of a commit's name."""
PANEL = "Lower is better; commits in the order of their first rows"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What was measured of a case at one commit.

    Attributes:
        commit: Its name, shortened; ``?`` where it is not known.
        started_at: When the first of its rows was begun.
        ms: Median milliseconds, of several launches their median.
        low: The low end of its bar (`reports.series.bar_ms`).
        high: The high end.
        card: The GPU, or the processor.
    """

    commit: str
    started_at: str
    ms: float
    low: float
    high: float
    card: str


def moments(rows: Iterable[Row], pattern: Pattern) -> list[Moment]:
    """What was measured of a case, commit by commit, in the order of their first rows.

    Of a name that means several cases the fastest at each commit counts.
    """
    found: dict[str, dict[object, list[Row]]] = {}
    for row in rows:
        if row.status == "ok" and pattern.fits(row.case):
            name = commit_of(row)[:NAME] or f"{str(row.environment.get('commit') or '?')[:NAME]}+"
            found.setdefault(name, {}).setdefault(row.case, []).append(row)
    listed = []
    for name, cases in found.items():
        merged = [merge_launches(own) for own in cases.values()]
        best = min(merged, key=lambda row: row.median_ms or math.inf)
        low, high = bar_ms(best)
        listed.append(
            Moment(
                commit=name,
                started_at=min(row.started_at for own in cases.values() for row in own),
                ms=best.median_ms or math.nan,
                low=low,
                high=high,
                card=str(best.environment.get("gpu_uuid") or best.environment.get("cpu") or "?"),
            )
        )
    return sorted(listed, key=lambda moment: moment.started_at)


def change_points(times: Sequence[float]) -> list[int]:
    """Places of the first time of every new level, from 1; none of fewer than three times."""
    if len(times) < FEWEST:
        return []
    import numpy as np
    import ruptures

    logs = np.log(np.asarray(times, dtype=float))
    steps = np.abs(np.diff(logs))
    noise = max(LEAST_NOISE, float(median(steps)) / (0.6745 * math.sqrt(2)))
    found = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(logs).predict(pen=2 * noise**2 * math.log(len(logs)))
    return [int(place) for place in found[:-1]]


def draw(case: str, listed: Sequence[Moment], title: str | None = None) -> Drawing:
    """Time against commits in order, with a line where a new level begins."""
    look = Looks().style(Pattern.parse(case).model.rpartition("-")[0], 0)
    points = tuple(Point(x=i, y=one.ms, low=one.low, high=one.high) for i, one in enumerate(listed))
    changes = change_points([one.ms for one in listed])
    told = "; ".join(
        f"{listed[place].commit}: {number(listed[place - 1].ms)} to {number(listed[place].ms)} ms" for place in changes
    )
    cards = len({one.card for one in listed})
    caption = (
        f"{listed[0].started_at[:10]} to {listed[-1].started_at[:10]}. {cards} card{'s' * (cards > 1)}. Bars: 10th to "
        "90th percentile of steps, or fastest to slowest launch. A name with +: with changes that no commit has.\n"
        f"New levels: {told or 'none'}."
    )
    with mpl.rc_context(dict(drawing.RC)):
        figure, (axes,) = drawing.assemble(
            1, title=title or f"{case} over commits", caption=caption, styles={case: look}
        )
        drawing.draw_panel(
            axes, [Line(label=case, style=look, points=points)], title=PANEL, x_label="",
            y_label="Milliseconds a step (log axis)", x_ticks={float(i): one.commit for i, one in enumerate(listed)},
            failures_at="top",
        )  # fmt: skip
        for label in axes.get_xticklabels():
            label.set_rotation(25)
        for place in changes:
            axes.axvline(
                place - 0.5, color=drawing.SOFT_INK, linewidth=0.9, linestyle=(0, (4, 3)), gid=f"change:{place}"
            )
    return Drawing(figure=figure)


def table(listed: Sequence[Moment]) -> bytes:
    """The numbers as CSV; ``level`` counts from 0 and rises where a new one begins."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["commit", "started_at", "ms", "low", "high", "card", "level"])
    changes = change_points([one.ms for one in listed])
    for place, one in enumerate(listed):
        level = sum(change <= place for change in changes)
        writer.writerow([one.commit, one.started_at, one.ms, one.low, one.high, one.card, level])
    return text.getvalue().encode()


@app.command(cls=OneLineCommand)
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl", help="Files of rows, of any commits.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write into; made if it is not there.")],
    case: Annotated[
        list[str],
        typer.Option(
            metavar="CASE", help="As DiG-S/2:triton@1792:train; what it leaves out may be anything. Again for another."
        ),
    ],
    title: Annotated[str | None, typer.Option(help="Title, instead of the figure's own.")] = None,
) -> None:
    """Draw how a case's time went from commit to commit: history-N.png, .svg and .csv, a number for each case.

    Exit status 2: a file cannot be read or written, or has no row of a case.
    """
    with refusing(ResultError, ValueError, folder=out, hint="; choose another --out"):
        rows = [row for path in results for row in read_results(path).rows]
        out.mkdir(parents=True, exist_ok=True)
        for place, name in enumerate(case, 1):
            listed = moments(rows, Pattern.parse(name))
            if not listed:
                raise ResultError(f"no row of {name} has a time; the files hold {len(rows):,} rows of other cases")
            for file in draw(name, listed, title).save(out, f"history-{place}"):
                say(f"wrote {file}")
            write_file(out / f"history-{place}.csv", table(listed))
            say(f"wrote {out / f'history-{place}.csv'}")


if __name__ == "__main__":
    app(prog_name="python -m reports.history")
