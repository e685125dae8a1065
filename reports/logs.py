"""Training logs of any origin: a value has the kind that it should have, or one message names file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.store.decoding import parse_json
from bench.store.files import read_file

LEAST, MOST = 1e-30, 1e15
"""Of a number that is drawn, by size; zero is one too."""


class RunError(ValueError):
    """A run's logs cannot be used; the message names the file."""


def read_text(path: Path) -> str:
    """A file's text. Raises RunError."""
    try:
        return read_file(path).decode()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RunError(f"{path} is not text in UTF-8; is it a log of python -m dig train?") from None


def read_object(path: Path) -> Record:
    """The object that a file of JSON is. Raises RunError."""
    return Record(_parse(read_text(path), str(path), parse_json), str(path))


def read_lines(path: Path, *, finite: bool = True) -> list[Record]:
    """The objects of a file that has one a line.

    Args:
        path: The file.
        finite: Whether NaN and infinity are refused, as losses of a run that diverged may be.

    Raises:
        RunError: It cannot be read, or a line is something else.
    """
    parse: Callable[[str], Any] = parse_json if finite else json.loads
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            found.append(Record(_parse(line, where, parse), where))
    return found


def _parse(text: str, where: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON: {error}") from None


class Record:
    """An object of JSON whose values are asked for by kind.

    Args:
        content: What was parsed.
        where: File and line, for messages.

    Raises:
        RunError: It is no object; and from every question, that a value is absent or of another kind.
    """

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise RunError(f"{where}: not an object, as the logs of python -m dig train hold")
        self.content: dict[str, Any] = content
        self.where = where

    def _refuse(self, name: str, kind: str) -> RunError:
        return RunError(
            f"{self.where}: {name} must be {kind}; got {self.content.get(name)!r:.80}; is it a log of dig train?"
        )

    def word(self, name: str) -> str:
        """A text."""
        value = self.content.get(name)
        if not isinstance(value, str):
            raise self._refuse(name, "a word")
        return value

    def whole(self, name: str, least: int = 0) -> int:
        """A whole number from ``least`` on."""
        value = self.content.get(name)
        if type(value) is not int or not least <= value <= MOST:
            raise self._refuse(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, *, positive: bool = False, finite: bool = True) -> float:
        """A number: finite unless otherwise said, and above 0 where an axis is logarithmic."""
        value = self.content.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._refuse(name, "a number")
        size = abs(float(value)) if isinstance(value, float) or abs(value) <= MOST else math.inf
        good = (size == 0 and not positive) or LEAST <= size <= MOST
        if (finite and not good) or (positive and value <= 0):
            raise self._refuse(name, f"a{' positive' if positive else ''} number of common size")
        # A run that diverged so far may as well have reached infinity, and its square would.
        return math.copysign(math.inf, value) if size > MOST else float(value)

    def object(self, name: str) -> Record:
        """An object."""
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise self._refuse(name, "an object")
        return Record(value, f"{self.where}, {name}")
