"""``python -m reports.page FOLDER --out DIR``: everything that was measured on one page, and its figures as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from bench.messages import OneLineCommand, say
from bench.store.files import write_file
from bench.store.rows import ResultError
from bench.store.sheets import to_csv
from dig.family import closest
from reports.page.chart import Chart, Missing
from reports.page.drawn import draw
from reports.page.entries import Entry, entries
from reports.page.evidence import Evidence, gather
from reports.page.html import library, page
from reports.page.markdown import markdown
from reports.page.pictures import PICTURES, Picture, pictures
from reports.page.sections import NAMES, Figure, figures
from reports.refusing import refusing

app = typer.Typer(add_completion=False)
FIGURES = (*NAMES, *PICTURES)


@app.command(cls=OneLineCommand)
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Files that python -m bench wrote, of steps, sampling, probes or profiles, or folders of them.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write into; made where it does not exist.")
    ],
    figure: Annotated[
        list[str] | None,
        typer.Option(
            "--figure",
            metavar="NAME",
            help=f"Write this figure alone, without the page; repeat for several of {', '.join(FIGURES)}.",
        ),
    ] = None,
    claims: Annotated[
        Path | None,
        typer.Option("--claims", metavar="FILE", help="Verdicts on claims; by default claims.json beside the rows."),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Title, instead of the page's own.")
    ] = None,
) -> None:
    """Put everything that was measured on one page. Measures nothing and needs no GPU.

    It writes into DIR

    index.html: the page, whole in one file, to open in a browser;

    report.md: the same as Markdown, for a pull request;

    rows.csv: every row with the command that repeats it;

    figures/NAME.png, .svg, .csv: every figure, and its numbers.

    Exit status 2: a file cannot be read or written, or there are no rows.
    """
    with refusing(ResultError, folder=out, hint="; choose another --out"):
        for name in figure or ():
            if name not in FIGURES:
                raise ResultError(f"unknown figure {name!r:.80}: {closest(name, FIGURES)}")
        evidence = gather(paths, claims)
        made = figures(evidence, [name for name in figure or NAMES if name in NAMES])
        drawn, warnings = pictures(paths, figure or PICTURES)
        evidence = dataclasses.replace(evidence, warnings=(*evidence.warnings, *warnings))
        shown: list[Figure | Picture] = [*made, *drawn]
        if not figure:
            library()  # What is missing is said before anything is written.
        folder = out / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        for warning in evidence.warnings:
            say(f"warning: {warning}", err=True)
        for each in shown:
            _write(folder, each)
        for name in figure or ():
            if name in PICTURES and name not in {each.name for each in drawn}:
                say(f"did not write {name}: no folder that was named has its logs beside the rows")
        if not figure:
            _write_page(out, evidence, shown, title)


def _write(folder: Path, figure: Figure | Picture) -> None:
    if isinstance(figure, Missing):
        stale = sorted(path.name for path in folder.glob(f"{figure.name}.*") if path.suffix in (".png", ".svg", ".csv"))
        older = f"; {', '.join(stale)} there {'is' if len(stale) == 1 else 'are'} from an earlier run" if stale else ""
        say(f"did not write {figure.name}: {figure.why}{older}")
        return
    drawing = draw(figure) if isinstance(figure, Chart) else figure.drawing
    written = drawing.save(folder, figure.name)
    numbers = figure.csv() if isinstance(figure, Chart) else figure.numbers
    if numbers:
        path = folder / f"{figure.name}.csv"
        write_file(path, numbers)
        written.append(path)
    say(f"wrote {written[0]}, {', '.join(path.suffix for path in written[1:])}")
    for note in drawing.notes:
        say(f"  {note}")


def _write_page(out: Path, evidence: Evidence, shown: list[Figure | Picture], title: str | None) -> None:
    for name, content in (
        ("index.html", page(evidence, shown, title)),
        ("report.md", markdown(evidence, shown, title)),
        ("rows.csv", _csv(entries(evidence))),
    ):
        write_file(out / name, content)
        say(f"wrote {out / name}")


def _csv(listed: list[Entry]) -> str:
    records = ({**each.record(), "assumed": "yes" if each.assumed else ""} for each in listed)
    names = list(Entry.__dataclass_fields__)
    return to_csv(names, ([record[name] for name in names] for record in records))


if __name__ == "__main__":
    app(prog_name="python -m reports.page")
