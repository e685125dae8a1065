"""``prose.toml``: what gives each number of a page's prose, or why it is no measurement. Its head says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.store.decoding import require
from dig.environment import ROOT
from reports.cells import number
from reports.claims.finding import same_as_printed
from reports.claims.numbers import measured
from reports.claims.prose import HOLE, NUMBER, README, prose, quoted, read_page
from reports.claims.rows import Files
from reports.claims.spec import read_tables

ITS_MEMORY = "its memory"
DECLARED = Path(__file__).resolve().parents[1] / "prose.toml"


@dataclass(frozen=True, kw_only=True)
class Number:
    """Words of a page with numbers in them that rows give.

    Attributes:
        words: The page's, ``{}`` where a number stands.
        of: A query for each ``{}`` (`reports.claims.numbers.measured`); "its memory" is that of the case before it.
        rows: Name of the results file of cases.
        page: From the project's folder.
    """

    words: str
    of: tuple[str, ...]
    rows: str = ""
    page: str = README.name

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be looked up."""
        require(bool(self.of), "of is empty: give the query of each {}")
        require(self.words.count(HOLE) == len(self.of), "words need as many {} as of has queries")
        require(self.of[0] != ITS_MEMORY, f"{ITS_MEMORY!r} is of the case before it; of begins with it")

    @property
    def queries(self) -> list[str]:
        """Those of ``of``, whole."""
        return [
            f"memory of {self.of[index - 1]}" if query == ITS_MEMORY else query for index, query in enumerate(self.of)
        ]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Words of README whose numbers are no measurements.

    Attributes:
        why: What they are instead.
        words: As they stand, in one place or several.
    """

    why: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise ValueError on what explains nothing."""
        require(bool(self.why.strip()), "why is empty: say what the numbers are")
        for words in self.words:
            require(NUMBER.search(words) is not None, f"{words!r:.80} holds no number")
            require(HOLE not in words, f"{words!r:.80} has a {{}}, which is of [[number]]")


T = TypeVar("T", Number, Plain)


def read_declared(path: Path = DECLARED) -> tuple[list[Number], list[Plain]]:
    """Both kinds of entries.

    Raises:
        ClaimError: The file cannot be read, or says something else.
    """
    entries: Sequence[Number | Plain] = read_tables(path, {"number": Number, "plain": Plain})
    return (
        [entry for entry in entries if isinstance(entry, Number)],
        [entry for entry in entries if isinstance(entry, Plain)],
    )


@dataclass(frozen=True, kw_only=True)
class Said:
    """A number where it stands in a page's text.

    Attributes:
        start, end: Its place there, its marks' letters within.
        text: As it is printed, with the letters.
        now: As the rows give it.
    """

    start: int
    end: int
    text: str
    now: str


def numbers_of(entry: Number, files: Files, text: str) -> list[Said]:
    """The numbers of an entry's words, from the first to the last.

    A number keeps the digits that are printed, or has three where it had three. In a table letters are its row's marks.

    Args:
        entry: Words and queries.
        files: The rows.
        text: The page's prose, with its tables.

    Raises:
        ClaimError: The page no longer has the words, or a query has no answer.
        ResultError: A file cannot be read.
    """
    found = quoted(text, entry.words, entry.page)
    said = []
    for index, query in enumerate(entry.queries):
        printed, letters = found[2 * index + 1], found[2 * index + 2]
        value, marks = measured(query, entry.rows, files)
        now = f"{rewritten(printed, value)}{marks if entry.words.startswith('|') else letters}"
        start, end = found.start(2 * index + 1), found.end(2 * index + 2)
        said.append(Said(start=start, end=end, text=printed + letters, now=now))
    return said


def restated(entry: Number, files: Files, text: str = "") -> tuple[str, str]:
    """An entry's words as a page says them, and with the numbers as the rows give them: equal where the page is right.

    Args:
        entry: Words and queries.
        files: The rows.
        text: The page's prose; read where it is empty.

    Raises:
        ClaimError: As of `numbers_of`.
        ResultError: A file cannot be read.
    """
    text = text or prose(read_page(ROOT / entry.page), tables=True)
    numbers = numbers_of(entry, files, text)
    parts = entry.words.split(HOLE)
    was, now = (
        "".join(part + number for part, number in zip(parts, [*given, ""], strict=True))
        for given in ([one.text for one in numbers], [one.now for one in numbers])
    )
    return was, now


def rewritten(printed: str, value: float) -> str:
    """A value in the digits that are printed, or three where three were; the printed text where it is that."""
    plain = printed.replace(",", "")
    if same_as_printed(value, plain):
        return printed
    comma = "," if "," in printed else ""
    if not comma and plain == number(float(plain)):
        return number(value)
    return f"{value:{comma}.{len(plain.partition('.')[2])}f}"
