"""Files of rows, one JSON object a line, whatever the rows are of: read whole, written one at a time. No torch here.

A row is on the disk before the next measurement starts, and is never changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from bench.store.files import read_file, require_file_or_nothing


class ResultError(ValueError):
    """A results file cannot be read or written; the message says which line and what to do."""


class Storable(Protocol):
    """A row of any kind."""

    def to_json(self) -> str:
        """One line of JSON, without its newline."""


R = TypeVar("R", bound=Storable)
Parse = Callable[[str], R]
"""Reads a line that a row's `to_json` wrote. Raises ResultError, which says what is wrong with any other."""


@dataclass(frozen=True, kw_only=True)
class Results(Generic[R]):
    """What a file held.

    Attributes:
        rows: The rows, in the order of the file.
        torn: The bytes after the last newline, where the file ends inside a row; empty otherwise.
    """

    rows: tuple[R, ...]
    torn: bytes = b""


def read_lines(path: Path, parse: Parse[R]) -> Results[R]:
    """Read a file of rows. A last line without its newline is what a kill leaves: it is returned as ``torn``.

    Args:
        path: The file.
        parse: Of the kind of its rows.

    Raises:
        ResultError: The file cannot be opened, or a whole line of it is not a row; the message names file and line.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    return _rows_of(content, path, parse)


def _rows_of(content: bytes, path: Path, parse: Parse[R]) -> Results[R]:
    *lines, torn = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line.decode()))
        except UnicodeDecodeError:
            raise ResultError(f"{path}, line {number}: not text in UTF-8; is it a file of results?") from None
        except ResultError as error:
            raise ResultError(f"{path}, line {number}: {error}") from None
    return Results(rows=tuple(rows), torn=torn)


class LinesWriter(Generic[R]):
    """Appends rows to a file, each flushed to the disk; the only writer of its file while it is open.

    A torn last line is moved to ``<file>.torn`` first, so that nothing whole is lost and nothing torn is read as a row.
    A file that holds anything but rows of the kind is left as it is.

    Args:
        path: The file; it and its folders are made where they are missing.
        parse: Of the kind of its rows.
        go_on: What to do once a full disk has room again.

    Raises:
        ResultError: The file cannot be written, is written by another run, or holds something else.
    """

    def __init__(self, path: Path, parse: Parse[R], *, go_on: str = "start again") -> None:
        import fcntl

        self.path = path
        self.torn_path: Path | None = None
        self._parse, self._go_on = parse, go_on
        try:
            require_file_or_nothing(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a failed write leaves nothing behind that closing the file would try to write again.
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error.strerror}; choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ResultError(f"{path} is being written by another run; wait for it, or choose another --out") from None
        try:
            self._set_torn_line_aside()
        except BaseException:
            self._file.close()
            raise

    def _set_torn_line_aside(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        try:
            _rows_of(content[:whole], self.path, self._parse)
        except ResultError as error:
            raise ResultError(f"{error}; choose another --out") from None
        if whole == len(content):
            return
        self.torn_path = self.path.with_name(self.path.name + ".torn")
        try:
            require_file_or_nothing(self.torn_path)
            with self.torn_path.open("ab") as torn:
                torn.write(content[whole:] + b"\n")
                torn.flush()
                os.fsync(torn.fileno())
            self._file.truncate(whole)
        except OSError as error:
            raise ResultError(f"cannot write {self.torn_path}: {error.strerror}; choose another --out") from None

    @property
    def said_of_torn_line(self) -> str:
        """What to tell whoever started this about a torn last line; empty where there was none."""
        if self.torn_path is None:
            return ""
        return f"{self.path} ended inside a row; the torn line was moved to {self.torn_path}"

    def write(self, row: R) -> None:
        """Append one row and wait until it is on the disk.

        Raises:
            ResultError: It could not be written whole (a full disk, most often); the file is as it was before.
        """
        whole = os.fstat(self._file.fileno()).st_size
        rest = memoryview(row.to_json().encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)
            raise ResultError(
                f"cannot write {self.path}: {error.strerror}; the rows before are whole. Make room, then {self._go_on}"
            ) from None

    def close(self) -> None:
        """Close the file and let others write it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
