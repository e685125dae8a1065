"""Charts as matplotlib figures: PNG and SVG of what the page shows, of a chart's first panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.messages import visible
from reports import drawing
from reports.best_figure import write_labels
from reports.drawing import Failure, Line, Point, Style
from reports.figures import Drawing
from reports.page.chart import Chart, Datum, Panel

MOST_PANELS = {"lines": 2, "bars": 2, "stack": 2, "points": 1, "ratios": 1}
MOST_BARS = 16
"""Of a panel: more would lie on each other."""
PART_COLORS = ("#2E1A47", "#6B4C9A", "#A78BC9", "#D3C4E5", "#ECE6F3")
"""Of stacked bars, from the axis outwards: one hue that no family has, from dark to bright."""
HATCHES = ("", "////", "..", "\\\\\\\\", "xx")
"""Likewise: no two parts beside each other are alike in grey."""
NAME_INCHES = {"bars": 1.75, "stack": 1.55, "ratios": 3.6}
"""Of bars' names, left of a panel."""


def draw(chart: Chart) -> Drawing:
    """The figure."""
    panels = chart.panels[: MOST_PANELS[chart.kind]]
    with mpl.rc_context(dict(drawing.RC)):
        figure, axes = drawing.assemble(
            len(panels), title=chart.title, caption=_caption(chart, panels), styles=_legend(chart, panels)
        )
        _make_room(axes, chart, panels)
        for axis, panel in zip(axes, panels, strict=True):
            name = visible(panel.name) if len(chart.panels) > 1 else ""
            if chart.kind == "lines":
                _draw_lines(axis, chart, panel, name)
                continue
            wide = axis.get_position().width * drawing.WIDTH_INCHES
            axis.set_title(_cut(name, int(wide / 0.075)), loc="left", fontsize=8.5, fontweight="bold", pad=7)
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


def _make_room(axes: Sequence[Any], chart: Chart, panels: Sequence[Panel]) -> None:
    """Leave room for bars' names left of every panel; of two with the same names, left of the first."""
    if chart.kind not in NAME_INCHES:
        return
    width = drawing.WIDTH_INCHES
    room, gap, edge = NAME_INCHES[chart.kind], 0.35, 0.15
    named = 1 if _same_names(panels) else len(panels)
    panel = (width - edge - room * named - gap * (len(panels) - 1) - 0.1) / len(panels)
    left = edge
    for place, axis in enumerate(axes):
        box = axis.get_position()
        left += room if place < named else 0.0
        axis.set_position((left / width, box.y0, panel / width, box.height))
        left += panel + gap


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
        title=_cut(name, 60),
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


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _name_bars(axis: Any, names: Sequence[str], chart: Chart) -> None:
    """Names left of the axis, the first on top."""
    letters = int(NAME_INCHES[chart.kind] / 0.058)
    axis.set_yticks(range(len(names)), [_cut(visible(name), letters) for name in names], fontsize=7.5)
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
            axis.hlines(at, datum.low, datum.high, color=drawing.INK, linewidth=1.8, gid="spread")
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
            axis.vlines(mark, at - 0.36, at + 0.36, color=drawing.INK, linewidth=1.5, gid="mark")
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
        axis.plot(ends, roof, color=drawing.INK, linewidth=1.4, zorder=1, gid="roof")
    axis.set_xlabel(visible(chart.x_label), labelpad=5)
    axis.set_ylabel(visible(chart.y_label), labelpad=5)


def _draw_ratios(axis: Any, chart: Chart, panel: Panel) -> None:
    names = _bars(panel)
    _name_bars(axis, names, chart)
    axis.axvline(1.0 if panel.level is None else panel.level, color=drawing.INK, linewidth=1.0, gid="level")
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
