"""``python -m reports RESULTS.jsonl --out DIR``: draw the figures and write the tables."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.messages import OneLineCommand, say
from bench.store.files import write_file
from bench.store.rows import ResultError
from dig.family import closest
from reports.best_figure import best
from reports.figures import Drawing, model_size, speed_memory
from reports.refusing import refusing
from reports.series import SIZES, read_sweep, size_rank
from reports.tables import tables

app = typer.Typer(add_completion=False)
OTHERS = {
    **{name: f"reports.{name}" for name in ("ablation", "fashion", "follow", "history", "sampling", "scaling")},
    **{name: f"reports.{name}.__main__" for name in ("claims", "page")},
}
"""Modules of the other reports, which run by themselves too: ``python -m reports.history``."""


@app.command(cls=OneLineCommand)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS.jsonl",
            help="Results files of the benchmark. Of a case measured by several versions of the code on a machine, the "
            "newest counts; several launches of a case are shown as their median and range.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write into; made where it does not exist.")
    ],
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Title of figures and tables, instead of their own.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help=f"Model size of speed_memory: {', '.join(SIZES)}; else S."),
    ] = None,
) -> None:
    """Draw benchmark results: up to three figures and one page of tables.

    Needs no GPU and measures nothing: it reads results files, and writes into DIR

    speed_memory.png, .svg: speed and memory against resolution, a line per model;

    model_size.png, .svg: speed against model size, a panel per resolution;

    best.png, .svg: DiG's lead over the fastest attention, each in its fastest way, where some way compiles;

    tables.md: every number, with the hardware and versions it was measured on.

    python -m reports NAME is another report, of ablation, claims, fashion, follow, history, page, sampling and scaling;
    each has its --help.

    A figure shows one machine, precision, batch and execution (best: the fastest of all); the rest is printed.

    Exit status 2: a file cannot be read or written, or there are no rows.
    """
    with refusing(ResultError, folder=out, hint="; choose another --out"):
        sweep = read_sweep(results)
        sizes = sorted({row.case.size for row in sweep.rows}, key=size_rank)
        if size is not None and size not in sizes:
            raise ResultError(f"no row has size {size!r}; --size can be {' or '.join(sizes)}")
        size = size or "S"
        out.mkdir(parents=True, exist_ok=True)
        for warning in sweep.warnings:
            say(f"warning: {warning}", err=True)
        _write(
            out,
            "speed_memory",
            speed_memory(sweep, size=size, title=title),
            f"no timed row of size {size} and patch 2",
        )
        _write(out, "model_size", model_size(sweep, title=title), "no resolution at which two sizes were timed")
        _write(
            out,
            "best",
            best(sweep, title=title),
            "no point where both DiG on this project's kernels and attention were timed, and some way compiled",
        )
        path = out / "tables.md"
        write_file(path, tables(sweep, title=title))
        say(f"wrote {path}")


def _write(folder: Path, name: str, drawing: Drawing | None, reason: str) -> None:
    if drawing is None:
        stale = [path.name for path in sorted(folder.glob(f"{name}.*")) if path.suffix in (".png", ".svg")]
        older = (
            f"; {' and '.join(stale)} there {'is' if len(stale) == 1 else 'are'} from an earlier run" if stale else ""
        )
        say(f"did not write {name}: {reason}{older}")
        return
    for path in drawing.save(folder, name):
        say(f"wrote {path}")
    for note in drawing.notes:
        say(f"  {note}")


def main(words: Sequence[str]) -> None:
    """Run the report that the first word names, else this one. A word that could only be a name must be one."""
    if words and words[0].isalpha() and words[0] not in OTHERS and not Path(words[0]).exists():
        say(f"error: no file and no report {words[0]!r:.80}: {closest(words[0], list(OTHERS))}", err=True)
        raise SystemExit(2)
    if words and words[0] in OTHERS:
        other = importlib.import_module(OTHERS[words[0]])
        other.app(list(words[1:]), prog_name=f"python -m reports {words[0]}")
    app(list(words), prog_name="python -m reports")


if __name__ == "__main__":
    main(sys.argv[1:])
