"""The paper's two figures: speed and memory against resolution (its Fig. 1), and speed against size (its Fig. 2).

A figure is of one setting: one GPU, dtype, batch, mode and execution. Its caption says which; `Drawing.notes` says what
else the results held.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.store.files import write_file
from bench.store.rows import Row
from reports import drawing, layout
from reports.drawing import Failure, Line, Point
from reports.layout import Style
from reports.series import (
    ASSUMED_NOTE,
    MODE_NAMES,
    PRECISION_NAMES,
    STATUS_NAMES,
    Launches,
    Selection,
    Series,
    Setting,
    Sweep,
    bar_ms,
    doubts,
    is_assumed,
    launches_of,
    select,
    size_rank,
    span,
)

PATCH = 2
GIB = 2**30
PAPER_RESOLUTIONS = (1024, 2048)
_LONG_MODE_NAMES = {"train": "training step (forward, backward, fused AdamW)", "forward": "forward pass"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, and what to tell the person who asked for it."""

    figure: Figure
    notes: tuple[str, ...] = ()

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write ``name.png`` (1800 pixels wide) and ``name.svg``; the same figure gives the same bytes.

        Raises:
            OSError: One cannot be written.
        """
        paths = [folder / f"{name}.png", folder / f"{name}.svg"]
        write_file(paths[0], self.rendered("png", dpi=200, metadata={"Software": None}))
        write_file(paths[1], self.rendered("svg", metadata={"Date": None, "Creator": None}))
        return paths

    def rendered(self, format: str, **how: Any) -> bytes:
        """The bytes of a file."""
        content = io.BytesIO()
        with mpl.rc_context(dict(layout.RC)):
            self.figure.savefig(content, format=format, **how)
        return content.getvalue()


def speed_memory(sweep: Sweep, *, size: str = "S", title: str | None = None) -> Drawing | None:
    """FPS and peak memory against resolution; None where no row of this size has a number.

    Training steps; forward passes where there are no training steps.
    """
    candidates = [row for row in sweep.rows if row.case.size == size and row.case.patch == PATCH]
    selection = select(candidates, modes=("train", "forward"))
    if selection is None:
        return None
    others = len(sweep.rows) - len(candidates)
    setting, rows = selection.setting, selection.rows
    ticks = {float(row.case.resolution): str(row.case.resolution) for row in rows}
    words = MODE_NAMES[setting.mode]
    default = f"Speed and memory of a {words} against resolution, size {size}/{PATCH}"
    with mpl.rc_context(dict(layout.RC)):
        styles = styles_of(sweep, rows)
        speed = _lines(sweep, rows, styles, x=_resolution, point=_speed_point)
        memory = _lines(sweep, rows, styles, x=_resolution, point=_memory_point)
        figure, axes = layout.assemble(
            2,
            title=titled(title or default, setting),
            caption=caption_of(sweep, setting, rows),
            styles=_legend(sweep, styles),
        )
        drawing.draw_panel(
            axes[0],
            speed,
            title="(a) Speed: higher is better",
            x_label="Image side (pixels)",
            y_label=f"FPS of the {words} (images/s, log axis)",
            x_ticks=ticks,
            failures_at="bottom",
        )
        if any(line.points for line in memory):
            drawing.draw_panel(
                axes[1],
                memory,
                title="(b) Memory: lower is better",
                x_label="Image side (pixels)",
                y_label=f"Peak {'GPU' if setting.device == 'cuda' else 'process'} memory (GiB, log axis)",
                x_ticks=ticks,
                failures_at="top",
            )
        else:
            axes[1].set_axis_off()
            axes[1].text(0.5, 0.5, "these rows hold no memory figures", ha="center", transform=axes[1].transAxes)
    return Drawing(figure=figure, notes=_notes(selection, {"of another size or patch": others}))


def model_size(sweep: Sweep, *, title: str | None = None) -> Drawing | None:
    """FPS against model size, a panel per resolution; None where no resolution has two sizes.

    Forward passes; training steps where there are no forward passes.
    """
    candidates = [row for row in sweep.rows if row.case.patch == PATCH]
    sizes: dict[tuple[Setting, int], set[str]] = {}
    for row in candidates:
        if row.status == "ok":
            sizes.setdefault((Setting.of(row), row.case.resolution), set()).add(row.case.size)
    comparable = {key for key, found in sizes.items() if len(found) >= 2}
    selection = select(
        (row for row in candidates if (Setting.of(row), row.case.resolution) in comparable), modes=("forward", "train")
    )
    if selection is None:
        return None
    setting, rows = selection.setting, selection.rows
    resolutions = sorted({row.case.resolution for row in rows})
    shown = [r for r in PAPER_RESOLUTIONS if r in resolutions] or resolutions[-2:]
    unshown = [row for row in rows if row.case.resolution not in shown]
    sides = " and ".join(str(r) for r in resolutions if r not in shown)
    left_out = {
        "of another patch": len(sweep.rows) - len(candidates),
        "at a resolution where a setting has one size": sum(
            (Setting.of(row), row.case.resolution) not in comparable for row in candidates
        ),
        f"at {sides} pixels, for want of room": len(unshown),
    }
    rows = tuple(row for row in rows if row.case.resolution in shown)
    order = sorted({row.case.size for row in rows}, key=size_rank)
    ticks = {float(i): size for i, size in enumerate(order)}
    words = MODE_NAMES[setting.mode]
    with mpl.rc_context(dict(layout.RC)):
        styles = styles_of(sweep, rows)
        panels = [
            _lines(
                sweep,
                [row for row in rows if row.case.resolution == resolution],
                styles,
                x=lambda row: float(order.index(row.case.size)),
                point=_speed_point,
            )
            for resolution in shown
        ]
        figure, axes = layout.assemble(
            len(shown),
            title=titled(title or f"Speed of a {words} against model size, patch {PATCH}", setting),
            caption=caption_of(sweep, setting, rows),
            styles=_legend(sweep, styles),
        )
        for letter, resolution, lines, panel in zip("ab", shown, panels, axes, strict=False):
            drawing.draw_panel(
                panel,
                lines,
                title=f"({letter}) {resolution} \N{MULTIPLICATION SIGN} {resolution} pixels",
                x_label="Model size",
                y_label=f"FPS of the {words} (images/s, log axis)",
                x_ticks=ticks,
                failures_at="bottom",
            )
    return Drawing(figure=figure, notes=_notes(selection, left_out, len(rows)))


def styles_of(sweep: Sweep, rows: Iterable[Row]) -> dict[Series, Style]:
    """How the series with a number among these rows look: the same in all figures of a sweep."""
    timed = {Series.of(row) for row in rows if row.status == "ok"}
    return {series: sweep.looks.of(series.family, series.options) for series in sweep.labels if series in timed}


def _legend(sweep: Sweep, styles: Mapping[Series, Style]) -> dict[str, Style]:
    return {sweep.labels[series]: look for series, look in styles.items()}


def _resolution(row: Row) -> float:
    return float(row.case.resolution)


def _lines(
    sweep: Sweep,
    rows: Sequence[Row],
    styles: Mapping[Series, Style],
    *,
    x: Callable[[Row], float],
    point: Callable[[Row, float], Point | None],
) -> list[Line]:
    """The lines of one panel, in the sweep's order."""
    lines = []
    for series, look in styles.items():
        own = sorted((row for row in rows if Series.of(row) == series), key=x)
        points = tuple(p for row in own if row.status == "ok" and (p := point(row, x(row))) is not None)
        failures = tuple(
            Failure(x=x(row), word=STATUS_NAMES[row.status], assumed=is_assumed(row.case))
            for row in own
            if row.status != "ok"
        )
        if points or failures:
            lines.append(Line(label=sweep.labels[series], style=look, points=points, failures=failures))
    return lines


def _speed_point(row: Row, x: float) -> Point | None:
    fast, slow = bar_ms(row)
    images = 1000 * row.case.batch
    fps = row.fps
    assert fps is not None
    return Point(x=x, y=fps, low=images / slow, high=images / fast, assumed=is_assumed(row.case))


def _memory_point(row: Row, x: float) -> Point | None:
    peak = row.memory.peak if row.memory is not None else None
    if not peak:
        return None
    return Point(x=x, y=peak / GIB, low=peak / GIB, high=peak / GIB, assumed=is_assumed(row.case))


def titled(title: str, setting: Setting) -> str:
    """A figure's title; of a CPU it says that it is no GPU result."""
    return title if setting.device == "cuda" else f"{title} (CPU, not a GPU result)"


def caption_of(sweep: Sweep, setting: Setting, rows: Sequence[Row]) -> str:
    """What the figure shows: machine, date, dtype, batch, mode, execution; then the steps; then footnotes."""
    timed = [row for row in rows if row.status == "ok"]
    lines = [
        f"{setting.where} · {span([row.started_at[:10] for row in timed])} · {PRECISION_NAMES[setting.precision]}"
        f" · batch {setting.batch} · {_LONG_MODE_NAMES[setting.mode]} · {setting.way}",
        _points(timed),
        *doubted(timed),
    ]
    with_points = {Series.of(row) for row in timed}
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if Series.of(row) not in with_points:
            reasons.setdefault(sweep.labels[Series.of(row)], set()).add(STATUS_NAMES[row.status])
    if reasons:
        named = (f"{label} ({', '.join(sorted(words))})" for label, words in reasons.items())
        lines.append(f"Not drawn, for want of any number: {'; '.join(named)}.")
    if any(is_assumed(row.case) for row in rows):
        lines.append(ASSUMED_NOTE)
    return "\n".join(lines)


def _points(timed: Sequence[Row]) -> str:
    """What points and bars are: of steps, or of launches where any case has several."""
    several = [row for row in timed if isinstance(row, Launches)]
    if not several:
        return f"Points: median of {span([len(row.samples_ms) for row in timed])} steps. Bars: 10th to 90th percentile."
    of_steps = "; of one launch, 10th to 90th percentile of its steps" if len(several) < len(timed) else ""
    return (
        f"Points: median over {span([launches_of(row) for row in timed])} process launches of each one's median step. "
        f"Bars: fastest to slowest launch{of_steps}."
    )


def doubted(timed: Sequence[Row]) -> list[str]:
    """How many points carry a mark of doubt; the tables say which."""
    counts = Counter(mark for row in timed for mark in doubts(row))
    if not counts:
        return []
    named = ", ".join(f"{count} {mark}" for mark, count in counts.items())
    return [f"Marked, of {len(timed)} measurements: {named}; the tables say which."]


def _notes(selection: Selection, others: Mapping[str, int], shown: int | None = None) -> tuple[str, ...]:
    """What a figure shows, and a line for every reason for which it leaves rows out."""
    count = len(selection.rows) if shown is None else shown
    return (
        f"shows {selection.setting.where}, {selection.setting.describe()} ({count_rows(count)})",
        *(f"left out: {reason} ({count_rows(count)})" for reason, count in others.items() if count),
        *(f"left out: {s.where}, {s.describe()} ({count_rows(count)})" for s, count in selection.left_out.items()),
    )


def count_rows(count: int) -> str:
    """``1 row``, ``2 rows``."""
    return "1 row" if count == 1 else f"{count} rows"
