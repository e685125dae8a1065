"""The figure ``best``: DiG's lead over the fastest attention, both at their best, against resolution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl

from bench.messages import visible
from bench.store.rows import Row
from dig.family import Look
from reports import drawing, layout
from reports.best import ATTENTION, OURS, Contest, Lead, Role, Ways, contests, execution, failure, time
from reports.drawing import Line, Point
from reports.figures import Drawing, count_rows, doubted, titled
from reports.layout import WIDTH_INCHES, Style
from reports.series import (
    MODE_NAMES,
    PRECISION_NAMES,
    Launches,
    Setting,
    Sweep,
    launches_of,
    span,
)

_LOOKS: Mapping[str, Look] = {
    "train": Look(
        colors=("#D55E00", "#8C3D00", "#B8860B"),
        markers="oDpsv",
        dashes=("-", (0, (7, 1.5)), (0, (1, 1))),
        width=2.2,
    ),
    "forward": Look(
        colors=("#0072B2", "#003F66", "#5B5BA5"),
        markers="^P<H>",
        dashes=((0, (4, 2)), (0, (4, 1, 1, 1)), (0, (2, 3))),
        width=2.0,
    ),
}
"""Of modes: here a line is no family. Brightness, dashes and markers differ without colour too."""
_FONT_SIZE = 7.0
_LETTER_INCHES = 0.06
_LINE_POINTS = 9.5
"""From one label's middle to the next."""
_OFFSET_POINTS = 12.0


def best(sweep: Sweep, *, title: str | None = None) -> Drawing | None:
    """Draw the lead of DiG on this project's kernels; None where no task with a compiled way has times of both sides.

    A line, or a lone marker, for every mode, size, batch and precision; one machine.
    """
    machines: dict[tuple[str, str], list[Contest]] = {}
    for contest in contests(sweep.rows):
        machines.setdefault((contest.task.device, contest.task.machine), []).append(contest)

    def weight(key: tuple[str, str]) -> tuple[int, bool, str]:
        return (-sum(contest.lead(time) is not None for contest in machines[key]), key[0] != "cuda", key[1])

    if not machines:
        return None
    found = machines[min(machines, key=weight)]
    leads = [(contest, lead) for contest in found if (lead := contest.lead(time)) is not None]
    if not leads:
        return None
    ways = Ways(sweep, found)
    series: dict[str, list[tuple[Contest, Lead]]] = {}
    for contest, lead in leads:
        series.setdefault(label_of(contest), []).append((contest, lead))
    common = Counter(execution(lead.peer.case) for _, lead in leads).most_common(1)[0][0]
    setting = Setting.of(leads[0][1].ours)
    ticks = {math.log2(contest.task.resolution): str(contest.task.resolution) for contest, _ in leads}
    default = "DiG's lead over the fastest attention, both at their best"
    with mpl.rc_context(dict(layout.RC)):
        styles = lead_styles(series)
        figure, (axes,) = layout.assemble(
            1,
            title=titled(title or default, setting),
            caption=_caption(setting.where, found, leads, common, ways),
            styles=styles,
        )
        drawing.draw_panel(
            axes,
            [Line(label=label, style=styles[label], points=_points(own)) for label, own in series.items()],
            title="Above 1, DiG is faster",
            x_label="Image side (pixels, log axis)",
            y_label="Attention's time / DiG's time (log axis)",
            x_ticks=ticks,
            failures_at="bottom",
            level=1.0,
        )
        labels = [
            (point.x, point.y, peer_words(lead, ways, common), styles[label].color)
            for label, own in series.items()
            for point, (_, lead) in zip(_points(own), own, strict=True)
        ]
        write_labels(axes, labels)
    shown = sum(len(rows) for contest in found for rows in contest.rows.values())
    notes = [f"shows {setting.where}, {len(leads)} of {len(found)} points ({count_rows(shown)})"]
    if others := len(sweep.rows) - shown:
        notes.append(f"left out: of other machines, or of what was not compiled in any way ({count_rows(others)})")
    return Drawing(figure=figure, notes=tuple(notes))


def label_of(contest: Contest) -> str:
    """What the line of a task is called: everything but the resolution."""
    task = contest.task
    return f"{MODE_NAMES[task.mode]}, {task.size}/{task.patch}, batch {task.batch}, {PRECISION_NAMES[task.precision]}"


def lead_styles(series: Mapping[str, Sequence[tuple[Contest, Lead]]]) -> dict[str, Style]:
    """How lines look that are of a mode, size, batch and precision each, by `label_of`."""
    turns: Counter[str] = Counter()
    styles = {}
    for label, own in series.items():
        mode = own[0][0].task.mode
        styles[label] = layout.style(_LOOKS[mode], turns[mode])
        turns[mode] += 1
    return styles


def _points(own: Iterable[tuple[Contest, Lead]]) -> tuple[Point, ...]:
    return tuple(
        Point(x=math.log2(contest.task.resolution), y=lead.value, low=lead.low, high=lead.high) for contest, lead in own
    )


def peer_words(lead: Lead, ways: Ways, common: str) -> str:
    """The peer's way in short: ``FA4``; with the family where it is not Flash-DiT, how it ran where that is unusual."""
    role = Role.of(lead.peer.case)
    words = [ways.column(role)] if role is not None and role != ATTENTION[0] else []
    words += [kernels] if (kernels := ways.kernels(lead.peer)) else []
    words += [how] if (how := _unusual(execution(lead.peer.case), common)) else []
    return ", ".join(words)


def _unusual(executed: str, common: str) -> str:
    """What an execution has that the common one hasn't; all of it where it lacks something, whose place nothing takes.

    ``compiled by model, graph`` is ``compiled by model`` where ``compiled by block, graph`` is common, and ``graph``
    is ``graph``.
    """
    own, usual = executed.split(", "), common.split(", ")
    rest = [word for word in own if word not in usual]
    return ", ".join(rest) if len(own) == len(usual) else executed


def _caption(
    where: str, found: Sequence[Contest], leads: Sequence[tuple[Contest, Lead]], common: str, ways: Ways
) -> str:
    timed = list({id(row): row for _, lead in leads for row in (lead.ours, lead.peer)}.values())
    behind = sum(lead.value < 1 for _, lead in leads)
    lines = [
        f"{where} · {span([row.started_at[:10] for row in timed])} · "
        + ", ".join(dict.fromkeys(PRECISION_NAMES[contest.task.precision] for contest, _ in leads))
        + f" · DiG on this project's kernels ({'; '.join(dict.fromkeys(ways.way(lead.ours) for _, lead in leads))})",
        f"Each side in the fastest of the ways that were measured. Labels: the attention; {common}, unless they say "
        f"otherwise. DiG is slower at {behind} of {len(leads)} points.",
        _bars(timed),
        *doubted(timed),
    ]
    missing = []
    for contest in found:
        if contest.lead(time) is None:
            sides = {"DiG": (OURS,), "attention": ATTENTION}
            why = [
                f"{side}: {_status([row for role in roles for row in contest.rows.get(role, ())])}"
                for side, roles in sides.items()
                if contest.best(time, *roles) is None
            ]
            missing.append(f"{contest.task.describe()} ({', '.join(why)})")
    if missing:
        lines.append(f"Not drawn, for want of a time: {'; '.join(missing)}.")
    return "\n".join(lines)


def _status(rows: Sequence[Row]) -> str:
    return " or ".join(dict.fromkeys(failure(row) for row in rows if row.status != "ok")) or "not measured"


def _bars(timed: Sequence[Row]) -> str:
    """What points and bars are: of steps, or of launches where any case has several."""
    ends = "from the attention's fast end over DiG's slow one, to the opposite"
    several = [row for row in timed if isinstance(row, Launches)]
    if not several:
        steps = span([len(row.samples_ms) for row in timed])
        return (
            f"Points: ratio of medians of {steps} steps. Bars: {ends}; an end is the 10th or 90th percentile of steps."
        )
    of_steps = "; of one launch, the 10th or 90th percentile of its steps" if len(several) < len(timed) else ""
    return (
        f"Points: ratio of medians over {span([launches_of(row) for row in timed])} process launches. Bars: {ends}; an "
        f"end is the fastest or slowest launch{of_steps}."
    )


def write_labels(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points at their side, those of one resolution in a stack that nothing overlaps, tied to their points.

    Args:
        axes: With its limits set.
        labels: x, y, text and colour of each.
    """
    columns: dict[float, list[tuple[float, str, str]]] = {}
    for x, y, text, color in labels:
        columns.setdefault(x, []).append((y, visible(text), color))
    xs = sorted(columns)
    widths = {
        x: _OFFSET_POINTS / 72 + _LETTER_INCHES * max(len(text) for _, text, _ in own) for x, own in columns.items()
    }
    left, right = axes.get_xlim()
    panel = axes.get_position().width * WIDTH_INCHES
    # The last ones have only the margin beside them: it grows by what they need.
    last = min(widths[xs[-1]], panel / 3)
    right = max(right, xs[-1] + last * (xs[-1] - left) / (panel - last))
    axes.set_xlim(left, right)
    x_inches = panel / (right - left)
    low, high = (math.log10(y) for y in axes.get_ylim())
    y_points = 72 * layout.PANEL_INCHES / (high - low)
    for i, x in enumerate(xs):
        own = sorted(columns[x], key=lambda each: each[0])
        wanted = [(math.log10(y) - low) * y_points for y, _, _ in own]
        heights = _apart(wanted, gap=_LINE_POINTS, low=_LINE_POINTS / 2, high=72 * layout.PANEL_INCHES)
        room_after = ((xs[i + 1] if i + 1 < len(xs) else right) - x) * x_inches
        room_before = (x - (xs[i - 1] if i else left)) * x_inches
        after = room_after >= widths[x] or room_after >= room_before
        for (y, text, color), at, height in zip(own, wanted, heights, strict=True):
            axes.annotate(
                text,
                (x, y),
                xytext=(_OFFSET_POINTS if after else -_OFFSET_POINTS, height - at),
                textcoords="offset points",
                ha="left" if after else "right",
                va="center",
                fontsize=_FONT_SIZE,
                color=layout.INK,
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            )


def _apart(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Heights, ascending, at least a gap apart, near the wanted ones, and within bounds where there is room."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    # Pushed up only so far; half of the push goes back down, then all into the bounds.
    push = (heights[-1] - wanted[-1]) / 2
    heights = [height - push for height in heights]
    shift = max(low - heights[0], 0.0) or min(high - heights[-1], 0.0)
    return [height + shift for height in heights]
