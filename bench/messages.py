"""How a command of this project ends that cannot do what it was asked for. No torch here."""

from __future__ import annotations

from typing import NoReturn

import typer


def refuse(message: str) -> NoReturn:
    """End with exit status 2 and one clear message."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
