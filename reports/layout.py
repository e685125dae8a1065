"""What every figure has in common: its size, type and colours, how series look, and its title, legend and caption.

Lines differ without colour too: every family has its hue, its dash pattern and its marker (`reports.looks`), and every
series of a family its own shade and marker.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path

from bench.messages import visible
from dig.family import Look

WIDTH_INCHES = 9.0
PANEL_INCHES = 3.3
LEFT, RIGHT, GAP = 0.72, 0.1, 0.8
"""Inches left of the panels, right of them, and between them."""
INK = "#222222"
SOFT_INK = "#555555"
LINE = 1.2 / 72
"""Inches from one line of a text to the next, a point of its size."""
MOST_LINES = 4
"""Of a text that is wrapped; a longer one is nobody's name."""
PLAIN_WIDTH = 1.5
"""Points of a line that nothing stands for."""

RC: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
    # Titles, labels and names are shown as they were typed: $ is no formula, whatever a matplotlibrc says.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dig-diffusion",  # else matplotlib draws random ids, and no two SVGs of one figure are equal
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a series looks."""

    color: str
    marker: str
    dashes: Any
    width: float
    hollow: bool = False


def style(look: Look, variant: int) -> Style:
    """How the ``variant``-th series of a family looks, counted from 0.

    Args:
        look: The family's, with at least a colour, a marker and a dash pattern.
        variant: Its series take turns in the look's.
    """
    return Style(
        color=look.colors[variant % len(look.colors)],
        marker=look.markers[variant % len(look.markers)],
        dashes=_dashes(look.dashes[variant % len(look.dashes)]),
        width=look.width if variant == 0 else PLAIN_WIDTH,
        hollow=variant % 2 == 1,
    )


def _dashes(pattern: Any) -> Any:
    """A pattern as matplotlib takes it; from a row, its tuples are lists."""
    return pattern if isinstance(pattern, str) else (pattern[0], tuple(pattern[1]))


def plot_style(look: Style) -> dict[str, Any]:
    """A look as matplotlib's `Line2D` takes it."""
    return {
        "color": look.color,
        "linestyle": look.dashes,
        "linewidth": look.width,
        "marker": look.marker,
        "markersize": 7.5 if look.marker in "^v<>*" else 6,  # a triangle fills half of its square
        "markerfacecolor": "white" if look.hollow else look.color,
        "markeredgecolor": look.color if look.hollow else "white",
        "markeredgewidth": 1.2 if look.hollow else 0.7,
    }


def text_inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a line of text is drawn.

    Args:
        size: In points.
        weight: ``bold`` is wider.
    """
    font = FontProperties(family=RC["font.family"], size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def wrap(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """A text in lines of not more than ``inches``: broken between words, or within one that is wider by itself.

    Only what doesn't fit into `MOST_LINES` is cut, and ends in an ellipsis.
    """

    def fits(line: str) -> bool:
        return text_inches(line, size, weight) <= inches

    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if fits(longer):
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"{lines[MOST_LINES - 1][:-1]}…"]
            break
    return "\n".join(lines)


def panel_inches(panels: int) -> float:
    """How wide each of the panels is that `assemble` makes."""
    return (WIDTH_INCHES - LEFT - RIGHT - GAP * (panels - 1)) / panels


def assemble(
    panels: int,
    *,
    title: str,
    caption: str,
    styles: Mapping[str, Style],
    tall: float = PANEL_INCHES,
    above: float = 0.0,
    below: float = 0.0,
) -> tuple[Figure, list[Any]]:
    """A figure of panels side by side, with a title, a legend above the panels and a caption below them.

    Args:
        panels: At least one.
        title: Of the figure; panels get theirs afterwards.
        caption: Its lines are wrapped.
        styles: Label → look, in the order of the legend.
        tall: Inches of a panel.
        above: Inches that panels' titles take beyond a line.
        below: Inches that ticks' labels take beyond a line.
    """
    columns = _legend_columns(list(styles))
    legend_rows = math.ceil(len(styles) / columns)
    caption_lines = [part for text in caption.split("\n") for part in textwrap.wrap(visible(text), 155)]
    top = 0.42 + 0.2 * legend_rows + 0.36 + above
    bottom = 0.62 + 0.165 * len(caption_lines) + below
    height = top + tall + bottom
    figure = Figure(figsize=(WIDTH_INCHES, height))
    panel = panel_inches(panels)
    axes = [
        figure.add_axes(
            (
                (LEFT + i * (panel + GAP)) / WIDTH_INCHES,
                bottom / height,
                panel / WIDTH_INCHES,
                tall / height,
            )
        )
        for i in range(panels)
    ]
    figure.text(0.1 / WIDTH_INCHES, 1 - 0.12 / height, visible(title), fontsize=12, fontweight="bold", va="top")
    # matplotlib leaves out labels that begin with an underscore; the texts are set afterwards.
    handles = [Line2D([], [], **plot_style(look)) for look in styles.values()]
    legend = figure.legend(
        handles,
        ["x" * len(visible(label)) for label in styles],
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.36 / height),
        ncols=columns,
        frameon=False,
        handlelength=3.4,
        columnspacing=1.6,
        labelspacing=0.35,
    )
    for text, label in zip(legend.get_texts(), styles, strict=True):
        text.set_text(visible(label))
    figure.text(
        0.1 / WIDTH_INCHES,
        0.1 / height,
        "\n".join(caption_lines),
        fontsize=7.5,
        color=SOFT_INK,
        va="bottom",
        linespacing=1.4,
    )
    return figure, axes


def _legend_columns(labels: Sequence[str]) -> int:
    # An entry is its handle and spacing, 0.75 inches, and about 0.075 inches a letter.
    widest = 0.75 + 0.075 * max(map(len, labels))
    return max(1, min(len(labels), int(WIDTH_INCHES / widest)))
