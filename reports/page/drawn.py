"""Charts as matplotlib figures: PNG and SVG of what the page shows, of a chart's first panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.messages import visible
from reports import drawing, layout
from reports.best_figure import write_labels
from reports.drawing import Failure, Line, Point
from reports.figures import Drawing
from reports.layout import Style
from reports.page.chart import Chart, Datum, Panel

MOST_PANELS = {"lines": 2, "bars": 2, "stack": 2, "points": 1, "ratios": 1}
MOST_BARS = 16
"""Of a panel: more would lie on each other."""
PART_COLORS = ("#2E1A47", "#6B4C9A", "#A78BC9", "#D3C4E5", "#ECE6F3")
"""Of stacked bars, from the axis outwards: one hue that no family has, from dark to bright."""
HATCHES = ("", "////", "..", "\\\\\\\\", "xx")
"""Likewise: no two parts beside each other are alike in grey."""
NAME_INCHES = {"bars": 1.75, "stack": 1.55, "ratios": 3.6}
"""Most of bars' names, left of a panel; wider ones are wrapped."""
NAME_POINTS = 7.5
TITLE_POINTS = {"lines": drawing.TITLE_POINTS, "bars": 8.5, "stack": 8.5, "points": 8.5, "ratios": 8.5}
"""Of panels' names."""
EDGE, BETWEEN, TICK = 0.15, 0.35, 0.1
"""Inches left of the first names, between panels, and between a name and its bar."""


def draw(chart: Chart) -> Drawing:
    """The figure."""
    panels = chart.panels[: MOST_PANELS[chart.kind]]
    points = TITLE_POINTS[chart.kind]
    with mpl.rc_context(dict(layout.RC)):
        room = _room(chart, panels)
        names = [visible(panel.name) if len(chart.panels) > 1 else "" for panel in panels]
        titles = [layout.wrap(name, room.panel, points, "bold") for name in names]
        figure, axes = layout.assemble(
            len(panels),
            title=chart.title,
            caption=_caption(chart, panels),
            styles=_legend(chart, panels),
            tall=room.tall,
            above=max(title.count("\n") for title in titles) * points * layout.LINE,
        )
        for axis, left in zip(axes, room.lefts, strict=False):
            box = axis.get_position()
            width = layout.WIDTH_INCHES
            axis.set_position((left / width, box.y0, room.panel / width, box.height))
        for axis, panel, name, title in zip(axes, panels, names, titles, strict=True):
            if chart.kind == "lines":
                _draw_lines(axis, chart, panel, name)
                continue
            axis.set_title(title, loc="left", fontsize=points, fontweight="bold", pad=7)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(True, axis="x", color="#E3E3E3", linewidth=0.6)
            axis.set_axisbelow(True)
            {"bars": _draw_bars, "stack": _draw_stack, "points": _draw_points, "ratios": _draw_ratios}[chart.kind](
                axis, chart, panel
            )
        if chart.kind in NAME_INCHES and _same_names(panels):
            axes[-1].tick_params(axis="y", labelleft=False)
        if chart.kind == "stack":
            _legend_of_parts(figure, chart)
    left = len(chart.panels) - len(panels)
    notes = (
        (f"draws {len(panels)} of {len(chart.panels)} panels; the page and {chart.name}.csv have all",) if left else ()
    )
    return Drawing(figure=figure, notes=notes)


def _same_names(panels: Sequence[Panel]) -> bool:
    return len(panels) == 2 and _bars(panels[0]) == _bars(panels[1])


@dataclass(frozen=True, kw_only=True)
class _Room:
    """Inches that a chart's texts leave: of a panel its width and height, and where each begins if names move it."""

    panel: float
    tall: float = layout.PANEL_INCHES
    lefts: tuple[float, ...] = ()


def _room(chart: Chart, panels: Sequence[Panel]) -> _Room:
    """Room for bars' names left of every panel, as wide as they are; of two with the same names, left of the first."""
    if chart.kind not in NAME_INCHES:
        return _Room(panel=layout.panel_inches(len(panels)))
    named = panels[:1] if _same_names(panels) else panels
    texts = [[_wrapped(name, chart) for name in _bars(panel)] for panel in named]
    rooms = [
        TICK + max(layout.text_inches(line, NAME_POINTS) for text in own for line in text.split("\n")) for own in texts
    ]
    panel = layout.WIDTH_INCHES - EDGE - sum(rooms) - BETWEEN * (len(panels) - 1) - layout.RIGHT
    panel /= len(panels)
    lefts, left = [], EDGE
    for place in range(len(panels)):
        left += rooms[place] if place < len(rooms) else 0.0
        lefts.append(left)
        left += panel + BETWEEN
    # Half a line more than a name has, so that its lines are nearer to each other than to the next name's.
    lines = max(text.count("\n") + 1.5 for own in texts for text in own)
    rows = max(*map(len, texts), 3)
    return _Room(
        panel=panel,
        tall=max(layout.PANEL_INCHES, rows * lines * NAME_POINTS * layout.LINE),
        lefts=tuple(lefts),
    )


def _wrapped(name: str, chart: Chart) -> str:
    return layout.wrap(visible(name), NAME_INCHES[chart.kind] - TICK, NAME_POINTS)


def _caption(chart: Chart, panels: Sequence[Panel]) -> str:
    lines = [visible(line) for line in (chart.reading, *chart.caption) if line]
    longest = max(len({str(datum.x) for datum in panel.data}) for panel in panels)
    if chart.kind in ("bars", "stack", "ratios") and longest > MOST_BARS:
        lines.append(f"The first {MOST_BARS} of {longest} are drawn.")
    return "\n".join(lines)


def _legend(chart: Chart, panels: Sequence[Panel]) -> dict[str, Style]:
    if chart.kind == "stack":
        # Room for the parts, whose patches take the place of these.
        return {part: Style(color="#FFFFFF", marker="s", dashes="-", width=0.0) for part in chart.parts}
    shown = {datum.series for panel in panels for datum in panel.data}
    return {name: style for name, style in chart.styles.items() if name in shown}


def _legend_of_parts(figure: Any, chart: Chart) -> None:
    (legend,) = figure.legends
    handles = [
        Patch(facecolor=PART_COLORS[i], hatch=HATCHES[i], edgecolor="white", linewidth=0.6)
        for i in range(len(chart.parts))
    ]
    place = legend.get_bbox_to_anchor().transformed(figure.transFigure.inverted())
    legend.remove()
    made = figure.legend(
        handles,
        [visible(part) for part in chart.parts],
        loc="upper left",
        bbox_to_anchor=(0.0, place.y0),
        ncols=len(chart.parts),
        frameon=False,
        handlelength=2.0,
    )
    made.set_gid("parts")


def _draw_lines(axis: Any, chart: Chart, panel: Panel, name: str) -> None:
    order = list(dict.fromkeys(datum.x for datum in panel.data))

    def place(x: float | str) -> float:
        if isinstance(x, str):
            return float(order.index(x))
        return math.log2(x) if chart.log_x else x

    lines = []
    for series, style in chart.styles.items():
        own = [datum for datum in panel.data if datum.series == series]
        points = tuple(
            Point(
                x=place(datum.x),
                y=datum.y,
                low=datum.y if datum.low is None else datum.low,
                high=datum.y if datum.high is None else datum.high,
                assumed=datum.assumed,
            )
            for datum in own
            if datum.y is not None
        )
        failures = tuple(
            Failure(x=place(datum.x), word=datum.word, assumed=datum.assumed) for datum in own if datum.word
        )
        if points or failures:
            lines.append(Line(label=series, style=style, points=points, failures=failures))
    drawing.draw_panel(
        axis,
        lines,
        title=name,
        x_label=chart.x_label,
        y_label=f"{chart.y_label} (log axis)",
        x_ticks={place(x): f"{x:g}" if isinstance(x, float) else visible(str(x)) for x in order},
        failures_at="top" if "GiB" in chart.y_label else "bottom",
        level=panel.level,
    )
    labels = [
        (place(datum.x), datum.y, datum.label, chart.styles[datum.series].color)
        for datum in panel.data
        if datum.label and datum.y is not None
    ]
    if labels:
        write_labels(axis, labels)


def _bars(panel: Panel) -> list[str]:
    return list(dict.fromkeys(str(datum.x) for datum in panel.data))[:MOST_BARS]


def _name_bars(axis: Any, names: Sequence[str], chart: Chart) -> None:
    """Names left of the axis, the first on top."""
    axis.set_yticks(range(len(names)), [_wrapped(name, chart) for name in names], fontsize=NAME_POINTS)
    axis.set_ylim(max(len(names), 3) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(visible(chart.y_label), labelpad=5)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=chart.counts))


def _draw_bars(axis: Any, chart: Chart, panel: Panel) -> None:
    names = _bars(panel)
    _name_bars(axis, names, chart)
    most = max((datum.high or datum.y or 0.0 for datum in panel.data), default=0.0) or 1.0
    axis.set_xlim(0, 1.25 * most)
    for datum in panel.data:
        if str(datum.x) not in names:
            continue
        at, style = names.index(str(datum.x)), chart.styles[datum.series]
        if datum.y is not None:
            axis.barh(at, datum.y, height=0.62, color=style.color, gid=f"bar:{visible(datum.series)}")
        if datum.low is not None and datum.high is not None:
            axis.hlines(at, datum.low, datum.high, color=layout.INK, linewidth=1.8, gid="spread")
        text = datum.word or chart.written(datum.y or 0)
        axis.annotate(
            visible(text), (datum.high or datum.y or 0, at), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip


def _draw_stack(axis: Any, chart: Chart, panel: Panel) -> None:
    names, parts = _bars(panel), list(chart.parts)
    _name_bars(axis, names, chart)
    ends = [0.0] * len(names)
    for datum in sorted(panel.data, key=lambda each: parts.index(each.part)):
        if str(datum.x) not in names or not datum.y:
            continue
        at, part = names.index(str(datum.x)), parts.index(datum.part)
        axis.barh(
            at, datum.y, left=ends[at], height=0.66, facecolor=PART_COLORS[part], edgecolor="white", linewidth=0.6,
            hatch=HATCHES[part], gid=f"part:{datum.part}",
        )  # fmt: skip
        ends[at] += datum.y
    for at, (name, end) in enumerate(zip(names, ends, strict=True)):
        mark = panel.marks.get(name)
        if mark is not None:
            axis.vlines(mark, at - 0.36, at + 0.36, color=layout.INK, linewidth=1.5, gid="mark")
        text = " · ".join(chart.written(value) for value in (end, mark) if value is not None)
        axis.annotate(
            text, (max(end, mark or 0.0), at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            fontweight="bold",
        )  # fmt: skip
    axis.set_xlim(0, (1.45 if panel.marks else 1.2) * max(*ends, *panel.marks.values(), 1e-9))


def _draw_points(axis: Any, chart: Chart, panel: Panel) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True, color="#E3E3E3", linewidth=0.6)
    for datum in panel.data:
        style = chart.styles[datum.series]
        axis.plot(
            [datum.x], [datum.y], linestyle="none", marker=style.marker, markersize=8, color=style.color,
            markerfacecolor="white" if style.hollow else style.color, gid=f"point:{visible(datum.series)}",
        )  # fmt: skip
    if panel.roof is not None:
        ridge = panel.roof.flop_rate / panel.roof.byte_rate
        xs = [float(datum.x) for datum in panel.data] + [ridge]
        ends = [min(xs) / 2, ridge, max(xs) * 2]
        roof = [min(panel.roof.flop_rate, x * panel.roof.byte_rate) / 1e12 for x in ends]
        axis.plot(ends, roof, color=layout.INK, linewidth=1.4, zorder=1, gid="roof")
    axis.set_xlabel(visible(chart.x_label), labelpad=5)
    axis.set_ylabel(visible(chart.y_label), labelpad=5)


def _draw_ratios(axis: Any, chart: Chart, panel: Panel) -> None:
    names = _bars(panel)
    _name_bars(axis, names, chart)
    axis.axvline(1.0 if panel.level is None else panel.level, color=layout.INK, linewidth=1.0, gid="level")
    for datum in panel.data:
        if str(datum.x) not in names or datum.y is None:
            continue
        at, style = names.index(str(datum.x)), chart.styles[datum.series]
        _draw_ratio(axis, datum, at, style)


def _draw_ratio(axis: Any, datum: Datum, at: int, style: Style) -> None:
    if datum.low is not None and datum.high is not None:
        axis.hlines(at, datum.low, datum.high, color=style.color, linewidth=4, alpha=0.4, gid="spread")
    axis.plot(
        [datum.y], [at], linestyle="none", marker=style.marker, markersize=6, color=style.color,
        markerfacecolor="white" if style.hollow else style.color, gid=f"point:{visible(datum.series)}",
    )  # fmt: skip
