"""``python -m reports.sampling FILE.jsonl``: how fast models sample, as a table and as bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer

from bench.messages import OneLineCommand, cell, say, visible
from bench.sampling.rows import Comparison, SamplingCase, SamplingRow, compare, read_rows
from bench.store.files import write_file
from bench.store.lines import ResultError
from bench.store.selection import machine
from reports import layout
from reports.figures import Drawing
from reports.layout import Style
from reports.looks import Looks
from reports.refusing import refusing
from reports.series import STATUS_NAMES

PANELS = 3
"""Resolutions that a figure has room for."""

app = typer.Typer(add_completion=False)


def _where(rows: Sequence[SamplingRow]) -> str:
    """Device, versions and commit of the rows; of different values, all of them."""
    parts = []
    for key, prefix in (("gpu_name", ""), ("torch", "torch "), ("triton", "triton "), ("commit", "commit ")):
        values = dict.fromkeys(str(row.environment[key]) for row in rows if row.environment.get(key))
        if key == "gpu_name" and not values:
            values = dict.fromkeys(str(row.environment.get("cpu")) for row in rows)
        shown = [value[:10] if key == "commit" else value for value in values]
        parts += [prefix + " and ".join(shown)] if shown else []
    return ", ".join(parts)


def table(entries: Sequence[Comparison], title: str | None = None) -> str:
    """The whole of ``sampling.md``."""
    rows = [entry.row for entry in entries]
    lines = [
        f"# {cell(title or 'Samples a second')}",
        "",
        f"{cell(_where(rows))}. From noise to latents in the host's memory, without decoding; random weights. Medians, "
        "in brackets the interval that holds the median with the confidence given. Models took turns, batch by batch: "
        "the ratio to the peer, the last model of a run, is of batches of the same turn. GiB: the most that torch "
        "allocated at a time.",
    ]
    settings = list(dict.fromkeys(map(_setting, rows)))
    several = len({machine(row) for row in rows}) > 1
    for setting in settings:
        first = next(row for row in rows if _setting(row) == setting)
        lines += [
            "",
            f"## {cell(_setting_words(first.case))}{f', {cell(machine(first))}' if several else ''}",
            "",
            "| pixels | at once | model | samples/s | confidence | times the peer's speed | GiB |",
            "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for entry in entries:
            row = entry.row
            if _setting(row) != setting:
                continue
            speed = STATUS_NAMES.get(row.status, row.status) if row.speed is None else str(row.speed)
            confidence = "" if row.speed is None else f"{row.speed.confidence:.1%}"
            ratio = "peer" if entry.peer is None else "" if entry.ratio is None else str(entry.ratio)
            memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f}"
            lines.append(
                f"| {row.case.resolution} | {row.case.batch} | {cell(row.case.label)} | {speed} | {confidence} "
                f"| {ratio} | {memory} |"
            )
    return "\n".join(lines) + "\n"


def _setting(row: SamplingRow) -> tuple[Any, ...]:
    """What a section of the table and a figure have in common."""
    case = row.case
    return dataclasses.replace(case.setting, resolution=1, batch=1), machine(row)


def _setting_words(case: SamplingCase) -> str:
    return case.describe().replace(f"{case.batch} at once, ", "")


def draw(entries: Sequence[Comparison], title: str | None = None) -> Drawing | None:
    """Bars of samples a second, a panel for each resolution; None where no row has a speed.

    Of the setting of the last row that has one. Bars end at the median, whiskers at the ends of its interval.
    """
    timed = [entry for entry in entries if entry.row.speed is not None]
    if not timed:
        return None
    setting = _setting(timed[-1].row)
    rows = [entry.row for entry in timed if _setting(entry.row) == setting]
    all_sides = sorted({row.case.resolution for row in rows})
    sides = all_sides[:PANELS]
    names = " and ".join(map(str, all_sides[PANELS:]))
    left_out = {
        "without a speed": len(entries) - len(timed),
        "of other settings or machines": len(timed) - len(rows),
        f"at {names} pixels, for want of room": sum(row.case.resolution not in sides for row in rows),
    }
    rows = [row for row in rows if row.case.resolution in sides]
    styles: dict[str, Style] = {}
    looks = Looks(series=((row.case.family, row.case.options) for row in rows))
    for row in rows:
        styles[row.case.label] = looks.of(row.case.family, row.case.options)
    confidence = min(row.speed.confidence for row in rows if row.speed is not None)
    caption = (
        f"{_where(rows)}. {_setting_words(rows[0].case)}. From noise to latents, without decoding; random weights. "
        f"Whiskers: the interval that holds the median with a confidence of at least {confidence:.1%}."
    )
    with mpl.rc_context(dict(layout.RC)):
        figure, axes = layout.assemble(
            len(sides), title=title or "Samples a second: higher is better", caption=caption, styles=styles
        )
        for axis, side in zip(axes, sides, strict=True):
            here = [row for row in rows if row.case.resolution == side]
            _draw_bars(axis, here, styles)
            batches = " and ".join(dict.fromkeys(str(row.case.batch) for row in here))
            axis.set_title(f"{side} pixels, {batches} at once", loc="left", fontsize=10, fontweight="bold", pad=7)
        axes[0].set_ylabel("Samples a second", labelpad=5)
    notes = (f"left out of the figure: {count} rows {reason}" for reason, count in left_out.items() if count)
    return Drawing(figure=figure, notes=tuple(notes))


def _draw_bars(axis: Any, rows: Sequence[SamplingRow], styles: dict[str, Style]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xticks(range(len(rows)), [visible(row.case.family) for row in rows])
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.6, max(len(rows), 2) - 0.4)
    for place, row in enumerate(rows):
        speed = row.speed
        assert speed is not None
        axis.bar(
            place, speed.median, width=0.7, color=styles[row.case.label].color, gid=f"bar:{visible(row.case.label)}"
        )
        axis.vlines(place, speed.low, speed.high, color=layout.INK, linewidth=1.5)
        axis.annotate(
            f"{speed.median:.3g}", (place, speed.high), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    axis.set_ylim(0, 1.12 * max(row.speed.high for row in rows if row.speed is not None))


@app.command(cls=OneLineCommand)
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.jsonl", help="Rows of python -m bench sampling.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write into. Default: that of the first file.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of table and figure, instead of their own.")] = None,
) -> None:
    """Write sampling.md, and draw sampling.png and .svg. Measures nothing.

    Exit status 2: a file cannot be read or written, or there are no rows.
    """
    folder = out or files[0].parent
    with refusing(ResultError, folder=folder):
        rows: list[SamplingRow] = []
        for file in files:
            found = read_rows(file)
            rows += found.rows
            if found.torn:
                say(f"warning: {file} ends inside a row, which is left out", err=True)
        if not rows:
            raise ResultError(f"{files[0]} holds no rows")
        entries = compare(rows)
        if repeated := len(rows) - len(entries):
            say(f"warning: rows left out: {repeated} of cases that were measured again since", err=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sampling.md"
        write_file(path, table(entries, title))
        say(f"wrote {path}")
        drawn = draw(entries, title)
        if drawn is None:
            say("did not write sampling.png: no row has a speed")
            return
        for path in drawn.save(folder, "sampling"):
            say(f"wrote {path}")
        for note in drawn.notes:
            say(f"  {note}")


if __name__ == "__main__":
    app(prog_name="python -m reports.sampling")
