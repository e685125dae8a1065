"""``python -m reports.claims RESULTS.jsonl...``: what was claimed, what was measured, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.messages import OneLineCommand, say
from bench.store.files import write_file
from bench.store.rows import ResultError
from dig.environment import ROOT
from reports.claims.declared import Number, read_declared
from reports.claims.errors import ClaimError
from reports.claims.evaluate import judge_all
from reports.claims.readme import read_readme
from reports.claims.restating import applied, changes, read_pages
from reports.claims.rows import Files, check_written, kind_of, published
from reports.claims.spec import CLAIMS, Claims, names_of, read_claims
from reports.claims.telling import counted, to_json, to_markdown, to_text
from reports.refusing import refusing

MOST_NAMED = 3
"""Files that a message names one by one."""

app = typer.Typer(add_completion=False)


@app.command(cls=OneLineCommand)
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RESULTS.jsonl",
            help="Results files, or folders of them. Default: this project's published ones. A claim is tested on the "
            "file that it names; where that was not given, on those that no claim names, such as your own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write claims.md and claims.json into this folder, print a line."),
    ] = None,
    claims: Annotated[
        Path, typer.Option("--claims", metavar="FILE.toml", help="Claims; its head says how one is written.")
    ] = CLAIMS,
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="This claim alone; repeat for several.")
    ] = None,
    restate: Annotated[
        bool,
        typer.Option(
            "--restate",
            help="Judge nothing: write README's and docs' numbers as these rows give them, and print each that "
            "changed. Words stay.",
        ),
    ] = False,
) -> None:
    """Hold every claim of the paper and of README against stored rows: said, measured, interval, verdict.

    Measures nothing and needs no GPU. Parameters and multiply-adds are counted, which takes torch.

    Exit status 2: a file cannot be read or written, a claim cannot be tested, or no claim reads any of the files that
    were given.
    """
    with refusing(ClaimError, ResultError, folder=out or Path(), hint="; choose another --out"):
        paths = list(_files(files or published()))
        said = read_claims(claims)
        said = said.only(ids) if ids else said
        if restate:
            if out is not None:
                raise ClaimError("--restate judges nothing that --out could take: give one of them")
            numbers = [] if ids else read_declared()[0]
            _restate(said, numbers, Files(paths, said.files | {one.rows for one in numbers}))
            return
        given = Files(paths, said.files)
        findings = judge_all(said, given, read_readme())
        # Of one claim the others' files are not read, and published ones nobody asked for.
        unread = [path for path in paths if path not in given.used] if files or not ids else []
        if files and len(unread) == len(paths):
            # Every verdict would be "not measured", as if nobody had measured anything.
            raise ClaimError(_nothing_read(unread, said, ids or []))
        if unread:
            say(f"no claim reads {', '.join(path.name for path in unread)}", err=True)
        if out is None:
            typer.echo(to_text(findings))
            return
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("claims.md", to_markdown(findings)), ("claims.json", to_json(findings))):
            write_file(out / name, content)
            say(f"wrote {out / name}")
        say(counted(findings))


def _nothing_read(paths: Sequence[Path], claims: Claims, ids: Sequence[str]) -> str:
    """Why no verdict comes from these files, and what to do."""
    kinds = {path: kind_of(path) for path in paths[:MOST_NAMED]}
    given = [f"{path} (its first line is {kind})" if kind else str(path) for path, kind in kinds.items()]
    given += [f"{len(paths) - len(given)} others"] if len(paths) > len(given) else []
    unread = ", ".join(given)
    if not ids:
        return f"no claim reads {unread}. Claims are of steps: name a file that python -m bench run wrote"
    names = sorted({name for claim in claims.claims for name in names_of(claim)})
    instead = f"name {', '.join(names)} or a file of your own steps" if names else "name none: models are counted anew"
    return f"no claim that --id names reads {unread}. For {', '.join(ids)}, {instead}"


def _restate(claims: Claims, numbers: list[Number], files: Files) -> None:
    """Write pages whose numbers are not the rows'."""
    pages = read_pages(numbers)
    to_make = changes(pages, claims, numbers, files)
    if not any(to_make.values()):
        say("every number is as the rows give it")
    for name, found in to_make.items():
        for one in found:
            say(f"{name}, line {pages[name].count(chr(10), 0, one.start) + 1}: {one.was.strip()} -> {one.now.strip()}")
        if found:
            write_file(ROOT / name, applied(pages[name], found))
            say(f"wrote {name}: read its words again, which were written about other numbers")


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Files, and those of folders, in which others may lie.

    Raises:
        ResultError: A file is not of this project, or a folder holds none.
    """
    for path in paths:
        if not path.is_dir():
            check_written(path)
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ResultError(f"no .jsonl files in {path}")
        yield from found


if __name__ == "__main__":
    app(prog_name="python -m reports.claims")
