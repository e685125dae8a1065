"""Command lines whose usage errors are one line, with status 2, like every other bad input. No torch here."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dig.environment import version_line
from dig.launched import speaks
from dig.messages import one_line

MOST_LETTERS = 400
"""Of a message of typer's: it quotes what was typed."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version_line())
        raise typer.Exit


def root(
    version: Annotated[  # read by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions, and end.")
    ] = False,
) -> None:
    """What a command line takes before its command."""


def _one_line(main: Any, standalone: bool, *arguments: Any, **named: Any) -> Any:
    """Run a command; what typer has to say about its options is one line, like everything else."""
    try:
        status = main(*arguments, standalone_mode=False, **named)
    except typer.Abort:
        typer.echo("stopped", err=True)
        sys.exit(130)
    except Exception as error:
        # Of which package typer's exceptions are, depends on its version.
        if not standalone or not hasattr(error, "format_message"):
            raise
        # Else another rank says it: all were started with the same words.
        if speaks():
            typer.echo(_told(error), err=True)
        sys.exit(2)
    if not standalone:
        return status
    sys.exit(status or 0)


def _told(error: Any) -> str:
    """What is wrong with the options, in a line; the help of a command that was given none."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    context = getattr(error, "ctx", None)
    hint = f"; see {context.command_path} --help" if context is not None else ""
    return f"error: {one_line(error.format_message()).rstrip('.')[:MOST_LETTERS]}{hint}"


class OneLineCommand(TyperCommand):
    """A command whose usage errors are one line, with status 2."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **named: Any) -> Any:
        """See click."""
        return _one_line(super().main, standalone_mode, *arguments, **named)


class OneLineGroup(TyperGroup):
    """Commands whose usage errors are one line, with status 2."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **named: Any) -> Any:
        """See click."""
        return _one_line(super().main, standalone_mode, *arguments, **named)
