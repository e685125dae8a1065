"""The page: one HTML file with its styles, its script, its data and the library that draws, and nothing to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.messages import visible
from bench.store.lines import ResultError
from reports import cells
from reports.page.chart import Chart, Missing, style_record
from reports.page.claims import counted
from reports.page.colors import contrast, on_dark
from reports.page.drawn import PART_COLORS
from reports.page.entries import Entry, entries
from reports.page.evidence import Evidence
from reports.page.pictures import Picture
from reports.page.sections import SECTIONS, Figure

NEEDED = "vl-convert-python==1.9.0.post1"
"""Brings Vega, Vega-Lite and Vega-Embed (BSD-3-Clause) as one script of under a megabyte, without a network."""
TITLE = "DiG, DiT, Flash-DiT and DiS: what was measured"
PARTS_ON_DARK = ("#F1ECF8", "#C8B4E3", "#A184D0", "#7C5BB5", "#5E4292")
"""Of stacked bars on a dark page, from the axis outwards: the other way round, and none as dark as the page."""
CONTROLS = (
    ("x", "Across"), ("y", "Up"), ("mode", "Mode"), ("size", "Size"), ("px", "Resolution"), ("batch", "Batch"),
    ("way", "Execution"), ("precision", "Weights, precision"), ("file", "File"), ("machine", "Machine"),
)  # fmt: skip
FILTERS = (
    ("series", "Model"), ("size", "Size"), ("px", "Resolution"), ("mode", "Mode"), ("batch", "Batch"),
    ("way", "Execution"), ("precision", "Precision"), ("machine", "Machine"), ("file", "File"), ("word", "Failed"),
)  # fmt: skip
COLUMNS = (
    ("model", "Model", "text"), ("px", "px", "number"), ("mode", "Mode", "text"), ("batch", "Batch", "number"),
    ("way", "Execution", "text"), ("precision", "Precision", "text"), ("ms", "ms a step", "number"),
    ("fps", "images/s", "number"), ("gib", "GiB", "number"), ("marks", "Marks", "text"), ("date", "Measured", "text"),
    ("file", "File", "text"),
)  # fmt: skip


@cache
def library() -> str:
    """The script that draws.

    Raises:
        ResultError: The package that brings it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise ResultError(f'the page needs vl-convert-python; pip install "{NEEDED}"') from None
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def versions() -> dict[str, str]:
    """Of what draws."""
    import vl_convert

    return {"vega": str(vl_convert.get_vega_version()), "lite": str(vl_convert.get_vegalite_versions()[-1])}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page, with what it shows."""

    id: str
    short: str
    title: str
    text: str
    figures: tuple[Any, ...]


def sections(evidence: Evidence, figures: Sequence[Figure | Picture]) -> list[Section]:
    """Those that have something to show, in order."""
    found = []
    for id, (short, title, text) in SECTIONS.items():
        own = tuple(figure for figure in figures if figure.section == id)
        rows = bool(evidence.rows or evidence.scaled)
        holds = {"claims": bool(evidence.claims), "explore": rows, "rows": rows}
        if own or holds.get(id, False):
            more = f" {counted(evidence.claims)}" if id == "claims" else ""
            found.append(Section(id=id, short=short, title=title, text=text + more, figures=own))
    return found


class Colors:
    """Colours as custom properties of the page's style, which a dark page has others of."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def name(self, color: str, dark: str = "") -> str:
        """How the page's charts call a colour.

        Args:
            color: ``#RRGGBB``.
            dark: What it is on a dark page, where that isn't the same hue made visible.
        """
        pair = (color, dark or on_dark(color))
        return f"var({self._names.setdefault(pair, f'--c{len(self._names)}')})"

    def record(self, style: dict[str, Any]) -> dict[str, Any]:
        """A look whose colour is called so."""
        return {**style, "color": self.name(style["color"])}

    @property
    def css(self) -> str:
        """Both sets."""
        bright = "".join(f"{name}:{color};" for (color, _), name in self._names.items())
        dark = "".join(f"{name}:{shown};" for (_, shown), name in self._names.items())
        return f":root{{{bright}}}@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def page(evidence: Evidence, figures: Sequence[Figure | Picture], title: str | None = None) -> str:
    """The HTML.

    Args:
        evidence: What the rows table and the explorer show.
        figures: Charts, what is missing, and pictures.
        title: Instead of the page's own.
    """
    listed = entries(evidence)
    colors = Colors()
    data = _data(evidence, figures, listed, colors)
    style = colors.css + _file("page.css")
    scripts = (library(), _file("charts.js") + _file("page.js"))
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    environment = Environment(
        loader=PackageLoader("reports.page"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["number"] = cells.number
    return environment.get_template("page.html").render(
        policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'",
        title=visible(title or TITLE),
        lede="Speed, memory and samples a second of four diffusion backbones. Every number comes from a measured row, "
        "with its interval and the command that repeats it.",
        facts=facts(evidence),
        sections=sections(evidence, [_shown(figure) for figure in figures]),
        claims=evidence.claims,
        counted=counted,
        entries=[_visible(entry) for entry in listed],
        controls=CONTROLS,
        filters=FILTERS,
        columns=COLUMNS,
        warnings=[visible(warning) for warning in evidence.warnings],
        versions=versions(),
        style=Markup(style),
        data=Markup(data),
        library=Markup(scripts[0]),
        script=Markup(scripts[1]),
    )


def _data(evidence: Evidence, figures: Sequence[Figure | Picture], listed: Sequence[Entry], colors: Colors) -> str:
    """What the script reads: JSON in which no text can end the element that holds it."""
    charts = []
    for figure in figures:
        if isinstance(figure, Chart):
            record = figure.record()
            record["styles"] = {name: colors.record(style) for name, style in record["styles"].items()}
            charts.append(record)
    styles = {
        label: colors.record(style_record(evidence.looks.of(series.family, series.options)))
        for series, label in evidence.labels.items()
    }
    # Dark and bright change places, so that the part at the axis is the strongest on either page.
    parts = [
        {"color": colors.name(color, dark), "ink": colors.name(_ink(color), _ink(dark))}
        for color, dark in zip(PART_COLORS, PARTS_ON_DARK, strict=True)
    ]
    found = {"charts": charts, "entries": [entry.record() for entry in listed], "styles": styles, "parts": parts}
    text = json.dumps(found, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _ink(color: str) -> str:
    """What text on a colour is written in."""
    return max(("#FFFFFF", "#1D2127"), key=lambda ink: contrast(ink, color))


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """What heads the page: machines, rows, dates, commits."""
    rows = [row for _, row in (*evidence.rows, *evidence.scaled)]
    others = [entry.row for entry in evidence.sampling] + list(evidence.profiles)
    dates = sorted(each.started_at[:10] for each in (*rows, *others) if each.started_at)
    count = f"{len(rows)} of steps"
    count += f", {len(evidence.sampling)} of sampling" if evidence.sampling else ""
    count += f", {len(evidence.probes)} probes" if evidence.probes else ""
    found = [("Machine", " and ".join(evidence.machines)), ("Rows", count)]
    found += [("Measured", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")] if dates else []
    return [(name, visible(value)) for name, value in found if value]


def _shown(figure: Figure | Picture) -> Any:
    """With texts as they can be seen on a line; a chart's numbers are in the data."""
    if isinstance(figure, Missing | Picture):
        return figure
    panels = tuple(replace(panel, name=visible(panel.name)) for panel in figure.panels)
    return replace(figure, panels=panels, caption=tuple(visible(line) for line in figure.caption))


def _visible(entry: Entry) -> Entry:
    words: dict[str, Any] = {name: visible(value) for name, value in vars(entry).items() if isinstance(value, str)}
    return replace(entry, **words)


def _file(name: str) -> str:
    return resources.files("reports.page").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
