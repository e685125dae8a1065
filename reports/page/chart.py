"""A chart as data: what a figure file, the page and the Markdown all show. Knows nothing of rows or of drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.store.sheets import to_csv
from reports.cells import number
from reports.layout import Style

Kind = Literal["lines", "bars", "stack", "points", "ratios"]
"""Lines over a number; bars, or stacked ones, a line of text each; points under a roof; ratios beside 1."""


@dataclass(frozen=True, kw_only=True)
class Datum:
    """One number.

    Attributes:
        series: Whose it is: a key of the chart's styles.
        x: Where: a number for lines and points; else the name of the bar.
        y: The number; None where there is none.
        low, high: Ends of its interval; None without one.
        part: Of a stacked bar, which part.
        word: Why there is no number: ``OOM``.
        label: What stands beside it; mostly nothing.
        text: What else to say of it, in a line.
        command: What measures it again.
        assumed: The model's size is this project's assumption.
    """

    series: str
    x: float | str
    y: float | None = None
    low: float | None = None
    high: float | None = None
    part: str = ""
    word: str = ""
    label: str = ""
    text: str = ""
    command: str = ""
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Roof:
    """A machine's ceilings: FLOP/s of products, bytes/s of memory."""

    name: str
    flop_rate: float
    byte_rate: float


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What is shown at once; of several, the page offers a choice and a figure draws the first.

    Attributes:
        name: What the choice is called; empty of a single one.
        data: The numbers.
        level: A line across that numbers are held against.
        roof: Of points.
        marks: Per bar, a number beyond it that is marked: a stacked bar's whole, say.
    """

    name: str = ""
    data: tuple[Datum, ...]
    level: float | None = None
    roof: Roof | None = None
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure.

    Attributes:
        name: Of its files: ``fig1a``.
        section: Of the page.
        title: A sentence's worth.
        kind: How it is drawn.
        panels: At least one.
        styles: Series → its look, in the order of the legend.
        parts: Of stacked bars: name → what it holds, from the axis outwards.
        x_label, y_label: Of the axes; y is the number's, also where bars lie.
        log_x, log_y: Whether an axis is logarithmic.
        counts: Whether numbers are of images or pixels, which rounding would make others of.
        caption: Card, versions, commit, date; what points and intervals are.
        reading: How to read it, in a sentence.
        command: What measures all of it again.
        missing: What was not measured, and the command that would.
    """

    name: str
    section: str
    title: str
    kind: Kind
    panels: tuple[Panel, ...]
    styles: Mapping[str, Style]
    parts: Mapping[str, str] = field(default_factory=dict)
    x_label: str = ""
    y_label: str
    log_x: bool = False
    log_y: bool = False
    counts: bool = False
    caption: tuple[str, ...] = ()
    reading: str = ""
    command: str = ""
    missing: tuple[tuple[str, str], ...] = ()

    def written(self, value: float) -> str:
        """A number as every form of the chart shows it: counts in full, others by three significant digits."""
        return f"{value:.0f}" if self.counts else number(value)

    def csv(self) -> str:
        """Every number, a line each."""
        names = ("series", "x", "part", "y", "low", "high", "word", "label", "assumed", "text", "command")
        return to_csv(
            ("panel", *names),
            ([panel.name, *(getattr(datum, name) for name in names)] for panel in self.panels for datum in panel.data),
        )

    def record(self) -> dict[str, Any]:
        """What the page's script draws it from."""
        return {
            "name": self.name,
            "title": self.title,
            "kind": self.kind,
            "panels": [
                {
                    "name": panel.name,
                    "level": panel.level,
                    "roof": None if panel.roof is None else vars(panel.roof),
                    "marks": dict(panel.marks),
                    "data": [{key: value for key, value in vars(each).items() if value != ""} for each in panel.data],
                }
                for panel in self.panels
            ],
            "styles": {name: style_record(style) for name, style in self.styles.items()},
            "parts": list(self.parts),
            "x": self.x_label,
            "y": self.y_label,
            "logX": self.log_x,
            "logY": self.log_y,
            "counts": self.counts,
        }


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure without data: why, and what would measure them."""

    name: str
    section: str
    title: str
    why: str
    command: str


_SHAPES: Mapping[str, str] = {
    "o": "M0.9,0A0.9,0.9,0,1,1,-0.9,0A0.9,0.9,0,1,1,0.9,0Z",
    "s": "M-0.8,-0.8L0.8,-0.8L0.8,0.8L-0.8,0.8Z",
    "^": "M0,-1L1,0.8L-1,0.8Z",
    "v": "M0,1L1,-0.8L-1,-0.8Z",
    "<": "M-1,0L0.8,-1L0.8,1Z",
    ">": "M1,0L-0.8,-1L-0.8,1Z",
    "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "d": "M0,-1L0.6,0L0,1L-0.6,0Z",
    "h": "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z",
    "H": "M-1,0L-0.5,-0.87L0.5,-0.87L1,0L0.5,0.87L-0.5,0.87Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
    "8": "M-0.4,-1L0.4,-1L1,-0.4L1,0.4L0.4,1L-0.4,1L-1,0.4L-1,-0.4Z",
    "*": "M0,-1L0.24,-0.31L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.31Z",
    "P": "M-0.3,-1L0.3,-1L0.3,-0.3L1,-0.3L1,0.3L0.3,0.3L0.3,1L-0.3,1L-0.3,0.3L-1,0.3L-1,-0.3L-0.3,-0.3Z",
    "X": "M-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0L-1,-0.5Z",
}
"""Each of matplotlib's filled markers as an SVG path within -1 to 1, which is how Vega takes a shape."""


def style_record(style: Style) -> dict[str, Any]:
    """A look as Vega-Lite takes it."""
    dashes = [] if style.dashes == "-" else [round(2.2 * length, 1) for length in style.dashes[1]]
    return {
        "color": style.color,
        "shape": _SHAPES.get(style.marker, _SHAPES["o"]),
        "dash": dashes or [1, 0],
        "width": style.width,
        "hollow": style.hollow,
    }
