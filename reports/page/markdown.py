"""The page as Markdown, for a pull request: the same figures, as pictures and as tables of their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from bench.messages import cell, visible
from reports.cells import number
from reports.page.chart import Chart, Datum, Missing, Panel
from reports.page.evidence import Evidence
from reports.page.html import TITLE, Section, facts, sections
from reports.page.pictures import Picture
from reports.page.sections import Figure

MOST_PANELS = 4
"""Of a figure as tables; its CSV has all."""


def markdown(evidence: Evidence, figures: Sequence[Figure | Picture], title: str | None = None) -> str:
    """The whole of ``report.md``; its pictures lie in ``figures/`` beside it."""
    lines = [f"# {cell(title or TITLE)}", ""]
    lines += [f"**{name}:** {cell(value)}  " for name, value in facts(evidence)]
    for section in sections(evidence, figures):
        if section.id == "explore":
            continue  # Choosing is the page's; its rows are in rows.csv.
        lines += ["", f"## {section.title}"]
        lines += ["", section.text] if section.text and section.id != "rows" else []
        if section.id == "claims":
            lines += _claims(evidence)
        if section.id == "rows":
            count = len(evidence.rows) + len(evidence.scaled)
            lines += ["", f"{count} rows, each with the command that repeats it: [rows.csv](rows.csv)."]
        lines += _figures(section)
    if evidence.warnings:
        lines += ["", "## Left out, or read with a warning", ""]
        lines += [f"- {cell(warning)}" for warning in evidence.warnings]
    return "\n".join(lines) + "\n"


def _claims(evidence: Evidence) -> list[str]:
    lines = ["", "| said | by | measured | interval | verdict |", "| --- | --- | ---: | ---: | --- |"]
    for claim in evidence.claims:
        interval = "" if claim.interval is None else f"[{', '.join(map(number, claim.interval))}]"
        words = (claim.said, claim.source, claim.measured or "not measured", interval, claim.verdict or "open")
        lines.append(f"| {' | '.join(map(cell, words))} |")
    # The step that judges names the claim.
    steps = [
        claim.steps if claim.judging else f"{claim.steps}  # {claim.id}" for claim in evidence.claims if claim.steps
    ]
    lines += ["", *code("\n".join(steps))] if steps else []
    again = [claim.again for claim in evidence.claims if claim.again]
    lines += ["", "The verdicts alone, from these rows:", "", *code("\n".join(again))] if again else []
    return lines


def code(text: str) -> list[str]:
    """A block that no text can leave."""
    flat = "\n".join(visible(line).replace("```", "'''") for line in text.split("\n"))
    return ["```", *flat.split("\n"), "```"]


def _figures(section: Section) -> list[str]:
    lines: list[str] = []
    for figure in section.figures:
        lines += ["", f"### {cell(figure.title)}", ""]
        if isinstance(figure, Missing):
            lines += [f"Not measured: {cell(figure.why)}. This measures it:", "", *code(figure.command)]
            continue
        lines += [f"![{cell(figure.title)}](figures/{figure.name}.png)", ""]
        if isinstance(figure, Chart):
            lines += [cell(figure.reading), ""]
        lines += ["  \n".join(cell(line) for line in figure.caption), ""]
        if isinstance(figure, Chart):
            for panel in figure.panels[:MOST_PANELS]:
                lines += [f"**{cell(panel.name)}**", ""] if panel.name else []
                lines += [*table(figure, panel), ""]
            left = len(figure.panels) - MOST_PANELS
            lines += [f"{left} more in [figures/{figure.name}.csv](figures/{figure.name}.csv).", ""] if left > 0 else []
        lines += code(figure.command)
        if isinstance(figure, Chart) and figure.missing:
            lines += [
                "",
                "Not measured yet:",
                "",
                *code("\n".join(f"{command}  # {what}" for what, command in figure.missing)),
            ]
    return lines


def table(chart: Chart, panel: Panel) -> list[str]:
    """A panel's numbers with their intervals: places down and series across, or a line each."""
    across = list(chart.parts) if chart.kind == "stack" else list(chart.styles) if chart.kind == "lines" else []
    across = [name for name in across if any(name in (datum.part, datum.series) for datum in panel.data)]
    if not across:
        lines = [f"| | {cell(chart.y_label)} | |", "| --- | ---: | --- |"]
        return lines + [
            f"| {cell(_place(datum, chart))} | {said(datum, chart)} | {cell(datum.text)} |" for datum in panel.data
        ]
    places = list(dict.fromkeys(datum.x for datum in panel.data))
    if all(isinstance(place, float) for place in places):
        places.sort()
    found = {(datum.x, datum.part or datum.series): datum for datum in panel.data}
    lines = [f"| {cell(chart.x_label)} | {' | '.join(map(cell, across))} |", "| --- |" + " ---: |" * len(across)]
    for place in places:
        cells = [said(found[place, name], chart) if (place, name) in found else "" for name in across]
        shown = f"{place:g}" if isinstance(place, float) else cell(place)
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def _place(datum: Datum, chart: Chart) -> str:
    if chart.kind == "points":
        return f"{datum.series}, at {number(float(datum.x))}"
    return str(datum.x)


def said(datum: Datum, chart: Chart) -> str:
    """``2.41 [2.40, 2.42]``, or why there is no number."""
    if datum.y is None:
        return cell(datum.word or "–")
    star = "*" if datum.assumed else ""
    if datum.low is None or datum.high is None or datum.low == datum.high:
        return chart.written(datum.y) + star
    return f"{chart.written(datum.y)}{star} [{chart.written(datum.low)}, {chart.written(datum.high)}]"
