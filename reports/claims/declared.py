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


def restated(entry: Number, files: Files, text: str = "") -> tuple[str, str]:
    """What a page says, and the same words with the numbers as the rows give them now: equal where the page is right.

    A number keeps the digits that are printed, or has three where it had three. In a table letters are its row's marks.

    Args:
        entry: Words and queries.
        files: The rows.
        text: The page's prose; read where it is empty.

    Raises:
        ClaimError: The page no longer has the words, or a query has no answer.
        ResultError: A file cannot be read.
    """
    text = text or prose(read_page(ROOT / entry.page), tables=True)
    found = quoted(text, entry.words, entry.page)
    first, *parts = entry.words.split(HOLE)
    now = [first]
    for index, (query, part) in enumerate(zip(entry.queries, parts, strict=True)):
        printed, letters = found[2 * index + 1], found[2 * index + 2]
        value, marks = measured(query, entry.rows, files)
        now.append(f"{_rewritten(printed, value)}{marks if entry.words.startswith('|') else letters}{part}")
    return found[0], "".join(now)


def _rewritten(printed: str, value: float) -> str:
    plain = printed.replace(",", "")
    if same_as_printed(value, plain):
        return printed
    comma = "," if "," in printed else ""
    if not comma and plain == number(float(plain)):
        return number(value)
    return f"{value:{comma}.{len(plain.partition('.')[2])}f}"
