"""``python -m bench compare`` and ``export``: what is done with results files once measured. No torch here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.judge.compare import Thresholds, compare_rows, exit_status, marks_of, to_markdown
from bench.messages import refuse, say
from bench.store.files import write_file
from bench.store.rows import ResultError, Results, Row, read_results
from bench.store.selection import differences, machine, newest


def percent(text: str, option: str) -> float:
    """``2``, ``2%`` and ``2.5 %`` as a share; anything else ends the command."""
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    # Below a millionth nothing is measured, and 1 + share would be 1.
    if not 1e-8 <= share < 1:
        refuse(f"{option} takes a percentage above 0 and below 100, such as 2%; got {text[:80]!r}")
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
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Judge cases too that the files have on different machines only.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the summary to this file too.")] = None,
) -> None:
    """Compare two results files, case by case: faster, same, slower or ambiguous, in time and in memory.

    Prints Markdown. Exit status 0: no regression; 1: something is slower, larger or broken; 3: nothing to compare, or
    undecided; 2: a file cannot be read. A case that ran on neither side (out of memory on both, say) is listed, and
    counts for nothing. An interval needs five launches a case on both sides (`bench run --launches`).

    Of a file that holds several measurements of a case, the newest counts. What differs between the files' machines,
    versions and settings is listed; a case that they have on different machines only gets a ratio and no verdict.
    """
    if out is not None:
        _spare((base, change), out)
    try:
        thresholds = Thresholds(
            time=percent(least_effect, "--least-effect"),
            memory=percent(least_memory, "--least-memory"),
            noise=None if noise is None else percent(noise, "--noise"),
        )
        sides = [read_results(path) for path in (base, change)]
    except ResultError as error:
        refuse(str(error))
    findings = compare_rows(sides[0].rows, sides[1].rows, thresholds, across_machines=across_machines)
    notes = _notes([(path.name, side) for path, side in zip((base, change), sides, strict=True)])
    text = to_markdown(findings, thresholds, title=f"{change.name} against {base.name}", notes=notes)
    typer.echo(text, nl=False)
    if out is not None:
        try:
            write_file(out, text)
        except OSError as error:
            refuse(f"cannot write {out}: {error.strerror}; choose another --out")
    raise typer.Exit(exit_status(findings))


def _spare(results: tuple[Path, ...], out: Path) -> None:
    """Refuse to write over what is read."""
    for path in results:
        if out.exists() and path.exists() and out.samefile(path):
            refuse(f"--out {out} is the results file itself, and measured rows are kept; choose another --out")


def _notes(sides: list[tuple[str, Results[Row]]]) -> list[str]:
    """What a reader of a comparison should know of the files: what differs, and what was left out."""
    chosen = [(name, newest(side.rows)) for name, side in sides]
    notes = [f"differs: {line}" for line in differences([(name, side.rows) for name, side in chosen])]
    found = [{(row.case, machine(row)) for row in side.rows} for _, side in chosen]
    for (name, side), own, other in zip(chosen, found, reversed(found), strict=True):
        cases = {case for case, _ in other}
        if only := {case for case, _ in own if case not in cases}:
            notes.append(f"{len(only)} cases are only in {name}: left out")
        shared = {case for case, _ in own & other}
        if elsewhere := {pair for pair in own - other if pair[0] in shared}:
            machines = " and ".join(sorted({where for _, where in elsewhere}))
            notes.append(f"{len(elsewhere)} cases are on {machines} in {name} alone: left out there")
        if words := side.describe():
            notes.append(f"{name}: {words}")
        if failed := Counter(row.status for row in side.rows if row.status != "ok"):
            counts = ", ".join(f"{count} {status}" for status, count in failed.items())
            notes.append(f"{name}: launches that failed, and are in no median: {counts}")
    notes += marks_of(*(side.rows for _, side in chosen))
    return notes + [f"{name} ends inside a row; left out" for name, side in sides if side.torn]


def export(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.jsonl", help="A results file.")],
    format: Annotated[str, typer.Option(help="parquet or csv.")] = "parquet",
    out: Annotated[Path | None, typer.Option(help="File to write; by default beside the results.")] = None,
) -> None:
    """Write results as a table, a line per row: for pandas, spreadsheets and databases.

    Nested fields become columns named with dots (memory.allocator_peak). Every sample is in parquet only; both have
    their median and number. All rows are written; the column ``newest`` is true of those that comparisons, figures and
    tables take. In CSV a text that a spreadsheet would take for a formula has a single quote before it.
    """
    from bench.store.export import FORMATS, export_rows

    if format not in FORMATS:
        refuse(f"unknown --format {format[:80]!r}: choose {' or '.join(FORMATS)}")
    try:
        rows = read_results(results).rows
        if not rows:
            refuse(f"{results} holds no rows")
        path = out if out is not None else results.with_suffix(f".{format}")
        _spare((results,), path)
        export_rows(rows, path, format)
    except ResultError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another --out")
    say(f"wrote {len(rows)} rows to {path}")
    if words := newest(rows).describe():
        say(f"not newest: {words.removeprefix('rows left out: ')}")
