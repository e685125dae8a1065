"""README and docs restated: the numbers that rows give, written where they stand as the rows give them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dig.environment import ROOT
from reports.claims.declared import Number, numbers_of, rewritten
from reports.claims.errors import ClaimError
from reports.claims.prose import README, located, quoted, read_page
from reports.claims.ratios import cells_now, subjects_of, value_of
from reports.claims.readme import LEAD, Section, cells_of, place_of_section
from reports.claims.rows import Files
from reports.claims.spec import Claims, Ratio


@dataclass(frozen=True, kw_only=True, order=True)
class Change:
    """Other words for a part of a page.

    Attributes:
        start, end: Of the part, in the page's Markdown.
        was, now: Its words.
    """

    start: int
    end: int
    was: str
    now: str


def changes(pages: Mapping[str, str], claims: Claims, numbers: list[Number], files: Files) -> dict[str, list[Change]]:
    """Where pages give other numbers than the rows, by page, in their order.

    Looked up are the numbers of ``prose.toml``, and README's of ratios: in sentences, and the lines of its tables of
    leads. A number keeps the digits that are printed, or has three where it had three; marks are the row's. Words are
    not changed: who reads a page that was restated may find a sentence that is no longer so.

    Args:
        pages: Markdown by name, from the project's folder; README and those that numbers stand on.
        claims: Of ``claims.toml``.
        numbers: Of ``prose.toml``.
        files: The rows.

    Raises:
        ClaimError: A page no longer has some words, or a query has no answer.
        ResultError: A file cannot be read.
    """
    found: dict[str, list[Change]] = {name: [] for name in pages}
    texts = {name: located(page, tables=True) for name, page in pages.items()}
    for entry in numbers:
        text, places = texts[entry.page]
        for said in numbers_of(entry, files, text):
            start, end = places[said.start], places[said.end - 1] + 1
            found[entry.page].append(Change(start=start, end=end, was=said.text, now=said.now))
    page = pages[README.name]
    for claim in claims.of(Ratio):
        if claim.finds_its_words and not claim.value:  # What the paper says stays.
            found[README.name] += _of_sentence(claim, page, files) if claim.quote else _of_line(claim, page, files)
    for name, each in found.items():
        for one in each:
            if pages[name][one.start : one.end] != one.was:
                raise ClaimError(f"{name}: {one.was!r} is in parts: write the number without marks of Markdown in it")
    return {name: sorted(one for one in set(each) if one.was != one.now) for name, each in found.items()}


def applied(page: str, to_make: list[Change]) -> str:
    """A page with these changes, which are in its order and do not overlap."""
    parts, end = [], 0
    for one in to_make:
        parts += [page[end : one.start], one.now]
        end = one.end
    return "".join([*parts, page[end:]])


def read_pages(numbers: list[Number]) -> dict[str, str]:
    """README and the pages that numbers stand on.

    Raises:
        ClaimError: One cannot be read.
    """
    return {name: read_page(ROOT / name) for name in dict.fromkeys([README.name, *(one.page for one in numbers)])}


def _of_sentence(claim: Ratio, page: str, files: Files) -> Iterator[Change]:
    value = value_of(claim, files)
    if value is None:
        return
    begin, end = place_of_section(page)
    text, places = located(page[begin:end])
    found = quoted(text, claim.quote)
    first, last = places[found.start(1)], places[found.end(1) - 1]
    yield Change(start=begin + first, end=begin + last + 1, was=found[1], now=rewritten(found[1], value))


def _of_line(claim: Ratio, page: str, files: Files) -> Iterator[Change]:
    source, value = files.source(claim.rows), value_of(claim, files)
    if source is None or value is None:
        return
    line = Section.of(page).line(*claim.line)
    peer, ours = subjects_of(claim)
    times, rest = (cells := cells_now(line, peer, ours, source))[:2], cells[2:]
    now = [next(iter(line.values())), *times, rewritten(line[LEAD], value), *rest]
    was = [text for text in page.splitlines() if cells_of(text) == list(line.values())]
    if len(was) != 1:
        raise ClaimError(f"{README.name} has {len(was)} lines {' | '.join(line.values())!r}, not one")
    begin = page.index(was[0])
    indent = was[0][: len(was[0]) - len(was[0].lstrip())]
    yield Change(start=begin, end=begin + len(was[0]), was=was[0], now=f"{indent}| {' | '.join(now)} |")
