"""Errors as one line for people."""

from __future__ import annotations


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
