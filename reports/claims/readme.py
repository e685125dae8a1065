"""README's section on what was measured: its sentences, the lines of its tables, and which of them no claim covers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reports.claims.errors import ClaimError
from reports.claims.prose import README, prose, quoted, read_page

HEADING = "## What the cards say"
LEAD = "DiG's lead"
"""The heading of a column of ratios."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What README says of what was measured.

    Attributes:
        prose: As `reports.claims.prose.prose` has it.
        tables: Each a list of lines, a line its cells by heading; the first cell's heading names the table.
    """

    prose: str
    tables: tuple[tuple[Mapping[str, str], ...], ...]

    @classmethod
    def of(cls, page: str) -> Section:
        """The section of a page.

        Raises:
            ClaimError: It has none.
        """
        start, end = place_of_section(page)
        section = page[start:end]
        tables: list[list[list[str]]] = []
        within = False
        for line in section.splitlines():
            if line.lstrip().startswith("|"):
                tables += [] if within else [[]]
                tables[-1].append(cells_of(line))
            within = line.lstrip().startswith("|")
        return cls(
            prose=prose(section),
            tables=tuple(
                tuple(dict(zip(head, line, strict=False)) for line in lines) for head, _, *lines in tables if lines
            ),
        )

    def quoted(self, quote: str) -> re.Match[str]:
        """Where these words stand; the first group is the number in the place of ``{}``.

        Raises:
            ClaimError: Nowhere, or in several places.
        """
        return quoted(self.prose, quote)

    def line(self, table: str, first: str) -> Mapping[str, str]:
        """A line of a table of leads, by the table's first heading and the line's first cell.

        Raises:
            ClaimError: There is none.
        """
        for lines in self._with_leads():
            if next(iter(lines[0])) == table:
                for line in lines:
                    if line[table] == first:
                        return line
        raise ClaimError(f"README has no line {first!r} in a table {table!r} with a column {LEAD!r}")

    def _with_leads(self) -> list[tuple[Mapping[str, str], ...]]:
        return [lines for lines in self.tables if LEAD in lines[0]]

    def uncovered(self, lines: Iterable[tuple[str, ...]]) -> list[str]:
        """The lines of leads that are none of these, each with its table's first heading."""
        known = set(lines)
        return [
            f"{heading}: {line[heading]}"
            for table in self._with_leads()
            for heading in [next(iter(table[0]))]
            for line in table
            if (heading, line[heading]) not in known
        ]


def place_of_section(page: str) -> tuple[int, int]:
    """Where the section's text begins in a page, after its heading, and where it ends.

    Raises:
        ClaimError: There is none.
    """
    heading = page.find(f"{HEADING}\n")
    if heading < 0:
        raise ClaimError(f"README has no section {HEADING!r}")
    start = heading + len(HEADING) + 1
    following = re.compile(r"^## ", re.MULTILINE).search(page, start)
    return start, len(page) if following is None else following.start()


def cells_of(line: str) -> list[str]:
    """The cells of a table's line, without what makes them bold."""
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def read_readme(path: Path = README) -> Section:
    """README's section.

    Raises:
        ClaimError: It cannot be read, or has none.
    """
    return Section.of(read_page(path))
