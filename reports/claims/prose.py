"""A page's prose: its words without code, tables and links' targets, the numbers in them, and which nobody explains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.store.files import read_file
from dig.environment import ROOT
from reports.claims.errors import ClaimError

README = ROOT / "README.md"
HOLE = "{}"
_VALUE = r"\d+(?:,\d{3})*(?:\.\d+)?"
NUMBER = re.compile(
    r"(?<!\w)(?<!\d[.,])(?<![A-Za-z][-/])"
    r"(?!(?=\d*[a-f])[\da-f]{7}\b)"  # A commit.
    r"\d+(?:[.,]\d+)*"
)
"""A number in prose, a version too. What follows a letter is part of a name: ``H100``, ``DiG-S/2``. Nor is a
commit one."""
_DROPPED = (
    (re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL), " "),
    (re.compile(r"<!--.*?-->", re.DOTALL), " "),
    (re.compile(r"(?<=\])\([^)]*\)"), ""),
    (re.compile(r"https?://\S+"), ""),
    (re.compile(r"(`+)[^`].*?\1", re.DOTALL), "``"),
    (re.compile(r"^[ \t]*\d+\.[ \t]", re.MULTILINE), " "),
    (re.compile(r"!?\[|\]|\*"), ""),
)
_TABLE = re.compile(r"^[ \t]*\|.*$", re.MULTILINE)


def read_page(path: Path) -> str:
    """A page's Markdown.

    Raises:
        ClaimError: It cannot be read.
    """
    try:
        return read_file(path).decode()
    except OSError as error:
        raise ClaimError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClaimError(f"{path}: not UTF-8") from None


def prose(markdown: str, *, tables: bool = False) -> str:
    """A page's words on one line, with its headings; with its tables where they are asked for."""
    return located(markdown, tables=tables)[0]


def located(markdown: str, *, tables: bool = False) -> tuple[str, Sequence[int]]:
    """`prose`, and for each of its characters the place in the page that it comes from."""
    text, places = markdown, list(range(len(markdown)))
    for pattern, instead in (*(() if tables else ((_TABLE, ""),)), *_DROPPED):
        text, places = _substituted(text, places, pattern, instead)
    return _substituted(text.strip(), places[len(text) - len(text.lstrip()) :], re.compile(r"\s+"), " ")


def _substituted(text: str, places: Sequence[int], pattern: re.Pattern[str], instead: str) -> tuple[str, list[int]]:
    """``pattern.sub(instead, text)``, what stands instead at the place where what it stands for began."""
    parts: list[str] = []
    kept: list[int] = []
    end = 0
    for found in pattern.finditer(text):
        parts += [text[end : found.start()], instead]
        kept += [*places[end : found.start()], *[places[found.start()]] * len(instead)]
        end = found.end()
    return "".join([*parts, text[end:]]), [*kept, *places[end : len(text)]]


def quoted(text: str, words: str, page: str = README.name) -> re.Match[str]:
    """Where these words stand; two groups for each ``{}``, which is a number: it, and the letters of its marks.

    Raises:
        ClaimError: Nowhere, or in several places.
    """
    parts = [re.escape(" ".join(part.split(" "))) for part in words.split(HOLE)]
    found = list(re.finditer(rf"(?<![\d.])({_VALUE})(?!\d|[.,]\d)([ᵗᵘᶜ]*)".join(parts), text))
    if len(found) != 1:
        places = "no longer says" if not found else f"says {len(found)} times"
        raise ClaimError(f"{page} {places} {words!r}; quote it as it is now")
    return found[0]


def unexplained(text: str, quotes: Iterable[tuple[str, str]], plain: Sequence[str]) -> list[str]:
    """The numbers that no quote gives the rows of and no plain words name, each with the words around it.

    Args:
        text: A page's prose.
        quotes: Words with holes, and the queries that fill them. A number that the words have outside of their holes
            is explained where a query has it too: the resolution that was asked for.
        plain: Words whose numbers are no measurements, wherever they stand.

    Raises:
        ClaimError: Some words stand nowhere, or hold no number.
    """
    numbers = list(NUMBER.finditer(text))
    known: set[int] = set()
    for words, queries in quotes:
        found = quoted(text, words)
        asked = set(re.findall(r"\d+", queries))
        known.update(found.start(index) for index in range(1, found.re.groups + 1))
        known.update(one.start() for one in numbers if _within(one, found) and one[0] in asked)
    for words in plain:
        named = [one.start() for found in re.finditer(re.escape(words), text) for one in numbers if _within(one, found)]
        if not named:
            raise ClaimError(f"no number of {README.name} stands in {words!r}; take it out of reports/prose.toml")
        known.update(named)
    return [
        f"{one[0]} in {text[max(0, one.start() - 50) : one.end() + 25].strip()!r}"
        for one in numbers
        if one.start() not in known
    ]


def _within(number: re.Match[str], words: re.Match[str]) -> bool:
    return words.start() <= number.start() and number.end() <= words.end()
