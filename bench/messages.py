"""How commands of this project speak: one line for bad input, and every text as it was typed. No torch here."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection
from typing import NoReturn

import typer

from dig.command_line import OneLineCommand, OneLineGroup
from dig.family import closest

__all__ = [
    "MOST_COUNT",
    "MOST_LETTERS",
    "MOST_SECONDS",
    "OneLineCommand",
    "OneLineGroup",
    "cell",
    "check_count",
    "check_positive",
    "one_of",
    "refuse",
    "say",
    "visible",
]

MOST_SECONDS = 1e6
"""Of any limit on time: eleven days."""
MOST_COUNT = 2**31 - 1
"""Of images, pixels, steps."""
MOST_LETTERS = 800
"""Of a message."""


def visible(text: str) -> str:
    """The text on one line, what cannot be seen in it written out: line ends, control characters, halves of pairs.

    A file name, a title or a message of code under test can then neither move the cursor nor end a line, an encoding
    or an XML file.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


_MARKS = re.compile(r"[|`@\[\]*!\\$~]|(?<!&)#|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown reads as more than itself; an underscore between letters is none of it."""


def cell(text: str) -> str:
    """Text that can neither leave its table cell nor become markup: messages hold what code under test says."""
    flat = visible(" ".join(text.split()))
    return _MARKS.sub(lambda found: f"&#{ord(found[0])};", html.escape(flat, quote=False))


def say(text: str, *, err: bool = False) -> None:
    """Print one line."""
    typer.echo(visible(text), err=err)


def refuse(message: str) -> NoReturn:
    """End with exit status 2 and one clear line, cut where it quotes more than anybody reads."""
    cut = message if len(message) <= MOST_LETTERS else f"{message[:MOST_LETTERS]}…"
    say(f"error: {cut}", err=True)
    raise typer.Exit(2)


def check_count(value: int, option: str, *, least: int = 1, most: int = MOST_COUNT) -> None:
    """Refuse a whole number outside its range."""
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        # A number of thousands of digits has no place in a message, nor may Python turn it into text.
        refuse(f"{option} must be {bound}; got {value if abs(value) < 10**20 else 'far more or less'}")


def one_of(value: str, option: str, known: Collection[str]) -> None:
    """Refuse a word that is not known, offering the closest that is."""
    if value not in known:
        refuse(f"unknown {option} {value[:80]!r}: {closest(value, tuple(known))}")


def check_positive(value: float, option: str, *, most: float = MOST_SECONDS) -> None:
    """Refuse a number that is not above 0, not finite, or too large."""
    if not 0 < value <= most:
        refuse(f"{option} must be positive and at most {most:,.0f}; got {value:g}")
