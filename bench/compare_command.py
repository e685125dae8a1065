"""``python -m bench compare`` and ``export``: what is done with results files once measured. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.compare import Thresholds, compare_rows, exit_status, marks_of, to_markdown
from bench.messages import refuse
from bench.results import ResultError, read_results


def percent(text: str, option: str) -> float:
    """``2``, ``2%`` and ``2.5 %`` as a share; anything else ends the command."""
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        refuse(f"{option} takes a percentage above 0 and below 100, such as 2%; got {text!r}")
    return share


def compare(
    base: Annotated[Path, typer.Argument(metavar="A.jsonl", help="Results of the base.")],
    change: Annotated[Path, typer.Argument(metavar="B.jsonl", help="Results of the change.")],
    least_effect: Annotated[str, typer.Option(help="The least difference of times that counts, in percent.")] = "2%",
    least_memory: Annotated[str, typer.Option(help="The least difference of memory peaks that counts.")] = "1%",
    noise: Annotated[
        str | None,
        typer.Option(
            help="The runner's noise floor in percent, as `bench regression --against-itself` measures it. With it, "
            "files of one launch a case can be compared too."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the summary to this file too.")] = None,
) -> None:
    """Compare two results files, case by case: faster, same, slower or ambiguous, in time and in memory.

    Prints Markdown. Exit status 0: no regression; 1: something is slower, larger or broken; 3: nothing to compare, or
    undecided; 2: a file cannot be read. A case that ran on neither side (out of memory on both, say) is listed, and
    counts for nothing. An interval needs five launches a case on both sides (`bench run --launches`).
    """
    try:
        thresholds = Thresholds(
            time=percent(least_effect, "--least-effect"),
            memory=percent(least_memory, "--least-memory"),
            noise=None if noise is None else percent(noise, "--noise"),
        )
        sides = [read_results(path) for path in (base, change)]
    except ResultError as error:
        refuse(str(error))
    findings = compare_rows(sides[0].rows, sides[1].rows, thresholds)
    cases = [{row.case for row in side.rows} for side in sides]
    notes = [
        f"{len(only)} cases are only in {path.name}: left out"
        for path, only in ((base, cases[0] - cases[1]), (change, cases[1] - cases[0]))
        if only
    ]
    notes += marks_of(*(side.rows for side in sides))
    for path, side in zip((base, change), sides, strict=True):
        if side.torn:
            notes.append(f"{path.name} ends inside a row; left out")
    text = to_markdown(findings, thresholds, title=f"{change.name} against {base.name}", notes=notes)
    typer.echo(text, nl=False)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            refuse(f"cannot write {out}: {error.strerror}; choose another --out")
    raise typer.Exit(exit_status(findings))


def export(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.jsonl", help="A results file.")],
    format: Annotated[str, typer.Option(help="parquet or csv.")] = "parquet",
    out: Annotated[Path | None, typer.Option(help="File to write; by default beside the results.")] = None,
) -> None:
    """Write results as a table, a line per row: for pandas, spreadsheets and databases.

    Nested fields become columns named with dots (memory.allocator_peak). Every sample is in parquet only; both have
    their median and number.
    """
    from bench.export import FORMATS, export_rows

    if format not in FORMATS:
        refuse(f"unknown format {format!r}: choose {' or '.join(FORMATS)}")
    try:
        rows = read_results(results).rows
        if not rows:
            refuse(f"{results} holds no rows")
        path = out if out is not None else results.with_suffix(f".{format}")
        export_rows(rows, path, format)
    except ResultError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another --out")
    typer.echo(f"wrote {len(rows)} rows to {path}")
