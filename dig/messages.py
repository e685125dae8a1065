"""Errors as one line for people.

A message about a value begins with its argument's name, as Python has it. A command puts the name there that was typed:
its option's, or the key of a file of options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_names: ContextVar[Mapping[str, str]] = ContextVar("names")
_BEGINNING = re.compile(r"([a-z]+(?:_[a-z]+)*)(?= (?:must|is one of|can't be)\b)")
# With an underscore it is a name of the code's wherever it stands, but in a path, a quotation or a dotted name.
_INSIDE = re.compile(r"(?<![\w./'\"-])([a-z]+(?:_[a-z]+)+)(?![\w/'\"(-]|\.\w)")


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Within, `in_words_of_the_command` knows these arguments by what was typed: ``{"log_every": "--log-every"}``."""
    before = _names.set(names)
    try:
        yield
    finally:
        _names.reset(before)


def in_words_of_the_command(text: str) -> str:
    """A message with the names of arguments as the command that runs has them; as it is where none runs."""
    names = _names.get({})

    def typed(found: re.Match[str]) -> str:
        return names.get(found[1], found[0])

    return _INSIDE.sub(typed, _BEGINNING.sub(typed, text, count=1) if _BEGINNING.match(text) else text)


def one_line(text: str) -> str:
    """The text on one line, what a terminal would obey (a file's name may hold anything) written out."""
    words = text.replace("\r", "\n").split("\n")
    joined = " ".join(part for part in (word.strip() for word in words) if part)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def describe(error: BaseException) -> str:
    """What an error says, on one line; of the system's errors the file and the reason, without the number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return one_line(f"{_name(error.filename)}: {error.strerror}")
    return one_line(str(error)) or type(error).__name__


def _name(name: object) -> str:
    return name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
