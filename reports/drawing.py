"""How a panel is drawn: lines with markers, spreads, and lanes for what failed. Knows nothing of result rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from bench.messages import visible
from reports.layout import INK, WIDTH_INCHES, Style, plot_style, wrap

TITLE_POINTS = 10.0
"""Of panels' titles."""
LANE = 0.075  # height of a lane of failures, as a share of the panel
LANE_COLOR = "#F4F4F4"
LABEL_INCHES = 0.31
"""From one tick's label to the next."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured point; ``low`` and ``high`` are the ends of its bar."""

    x: float
    y: float
    low: float
    high: float
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case without a number; ``word`` says why."""

    x: float
    word: str
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series in one panel, points and failures by ascending x; points may be missing, where all failed."""

    label: str
    style: Style
    points: tuple[Point, ...]
    failures: tuple[Failure, ...] = ()


def draw_panel(
    axes: Any,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Mapping[float, str],
    failures_at: Literal["top", "bottom"],
    level: float | None = None,
) -> None:
    """Draw lines on a logarithmic y axis, and a lane per failing line along the edge that failing leads to.

    At least one line must have points: they set the axis. A ``level`` is a thin line across, always in sight.
    """
    wide = axes.get_position().width * WIDTH_INCHES
    axes.set_title(
        wrap(visible(title), wide, TITLE_POINTS, "bold"), loc="left", fontsize=TITLE_POINTS, fontweight="bold", pad=7
    )
    axes.set_xlabel(visible(x_label), labelpad=5)
    axes.set_ylabel(visible(y_label), labelpad=5)
    axes.grid(True, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    _set_x(axes, x_ticks)
    lanes = _set_y(axes, lines, failures_at, level)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=1.0, zorder=1, gid="level")
    for line in lines:
        _draw_line(axes, line)
    for line, y in lanes:
        _draw_failures(axes, line, y)


def _draw_line(axes: Any, line: Line) -> None:
    look = line.style
    if not line.points:
        return
    xs = [p.x for p in line.points]
    # A line stops where a case failed: drawn through, it would claim a number that nobody measured.
    gaps = [(f.x, math.nan) for f in line.failures if xs[0] < f.x < xs[-1]]
    path = sorted([(p.x, p.y) for p in line.points] + gaps)
    axes.plot(
        [x for x, _ in path],
        [y for _, y in path],
        gid=f"line:{visible(line.label)}",
        label=line.label,
        zorder=3,
        **plot_style(look),
    )
    axes.vlines(
        xs,
        [p.low for p in line.points],
        [p.high for p in line.points],
        color=look.color,
        linewidth=look.width + 1.5,
        alpha=0.4,
        zorder=2,
        gid=f"spread:{visible(line.label)}",
    )
    guesses = [p for p in line.points if p.assumed]
    if guesses:
        # A ring around the point, and the asterisk at the last of them only: eight in a row would hide the line.
        axes.plot(
            [p.x for p in guesses],
            [p.y for p in guesses],
            gid=f"assumed:{visible(line.label)}",
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=look.color,
            markeredgewidth=0.8,
            zorder=3,
        )
        axes.annotate(
            "*",  # what it means is in the caption; a word would meet a neighbour's line
            (guesses[-1].x, guesses[-1].y),
            xytext=(8, -2),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=13,
            color=look.color,
        )


def _draw_failures(axes: Any, line: Line, y: float) -> None:
    """Crosses in the line's lane, named, and tied to the line by a thin dotted connector."""
    look = line.style
    before = [p for p in line.points if p.x < line.failures[0].x]
    if before:
        axes.plot(
            [before[-1].x, line.failures[0].x],
            [before[-1].y, y],
            color=look.color,
            linewidth=0.9,
            linestyle=(0, (1, 2)),
            zorder=2,
            gid=f"connector:{visible(line.label)}",
        )
    axes.plot(
        [f.x for f in line.failures],
        [y] * len(line.failures),
        gid=f"failed:{visible(line.label)}",
        color=look.color,
        linestyle="none",
        marker="x",
        markersize=7,
        markeredgewidth=2,
        zorder=4,
    )
    for x, align, text in _place_names(axes, line):
        axes.annotate(
            visible(text),
            (x, y),
            xytext=({"left": 8, "right": -8, "center": 0}[align], 0),
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=7.5,
            color=look.color,
            zorder=5,
            bbox={"facecolor": LANE_COLOR, "edgecolor": "none", "pad": 0.8},
        )


def _place_names(axes: Any, line: Line) -> Iterator[tuple[float, str, str]]:
    """Where the name of each run of equal failures goes: before the run, after it, or across where neither has room."""
    runs = [
        (text, [f.x for f in run])
        for text, run in groupby(line.failures, key=lambda f: f"{line.label}: {f.word}{'*' if f.assumed else ''}")
    ]
    taken, right = axes.get_xlim()
    units_per_inch = (right - taken) / (axes.get_position().width * WIDTH_INCHES)
    for i, (text, xs) in enumerate(runs):
        room = units_per_inch * (0.2 + 0.065 * len(text))
        following = runs[i + 1][1][0] if i + 1 < len(runs) else right
        if xs[0] - taken >= room:
            yield xs[0], "right", text
            taken = xs[-1]
        elif following - xs[-1] >= room:
            yield xs[-1], "left", text
            taken = xs[-1] + room
        elif len(xs) > 1:
            yield (xs[0] + xs[-1]) / 2, "center", text
            taken = xs[-1]
        else:
            # The lane is the line's own, and its connector says whose it is: the reason alone will do.
            yield xs[0], "right", text.rpartition(": ")[2]
            taken = xs[0]


def _set_x(axes: Any, ticks: Mapping[float, str]) -> None:
    xs = sorted(ticks)
    span = (xs[-1] - xs[0]) or 1.0
    axes.set_xlim(xs[0] - 0.08 * span, xs[-1] + 0.08 * span)
    labels: list[str] = []
    last = -math.inf
    inches = axes.get_position().width * WIDTH_INCHES
    for x in xs:
        # Four-digit labels closer than this touch.
        room = x - last >= LABEL_INCHES * span / inches
        labels.append(visible(ticks[x]) if room else "")
        last = x if room else last
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(FixedFormatter(labels))
    axes.xaxis.set_minor_locator(FixedLocator([]))


def _set_y(
    axes: Any, lines: Sequence[Line], failures_at: Literal["top", "bottom"], level: float | None
) -> list[tuple[Line, float]]:
    """Set limits and ticks so that the lanes stay clear of the data; returns the failing lines with their lane's y."""
    values = [v for line in lines for p in line.points for v in (p.low, p.high)]
    values += [] if level is None else [level]
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.07 * max(high - low, 0.3)
    failing = [line for line in lines if line.failures]
    clear_low, clear_high = low - pad, high + pad
    total = (clear_high - clear_low) / (1 - min(LANE * len(failing), 0.6))
    lane = (total - (clear_high - clear_low)) / max(len(failing), 1)
    if failures_at == "bottom":
        axes.set_ylim(10 ** (clear_high - total), 10**clear_high)
        centres = [clear_low - (i + 0.5) * lane for i in range(len(failing))]
        strip = (10 ** (clear_high - total), 10**clear_low)
    else:
        axes.set_ylim(10**clear_low, 10 ** (clear_low + total))
        centres = [clear_high + (i + 0.5) * lane for i in range(len(failing))]
        strip = (10**clear_high, 10 ** (clear_low + total))
    if failing:
        axes.axhspan(*strip, color=LANE_COLOR, linewidth=0, zorder=0)
    ticks = log_ticks(10**clear_low, 10**clear_high)
    ticks = sorted({*ticks, *([] if level is None else [level])})
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in ticks]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    return [(line, 10**centre) for line, centre in zip(failing, centres, strict=True)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive bounds: powers of ten; over less, 1-2-5 steps; over little, even steps."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5)):
        ticks = [float(f"{d}e{e}") for e in exponents for d in digits]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 4:
            return ticks
    return [float(t) for t in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]
