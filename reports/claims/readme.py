"""README's section on the H100: its sentences with their numbers, the lines of its tables, and what no claim covers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.store.files import read_file
from dig.environment import ROOT
from reports.claims.errors import ClaimError
from reports.claims.spec import HOLE

README = ROOT / "README.md"
HEADING = "## What the H100 says"
LEAD = "DiG's lead"
"""The heading of a column of ratios."""
_NUMBER = r"\d+(?:\.\d+)?"
_RATIO = re.compile(rf"(?<![\d.,]){_NUMBER}(?=(?: times|%)(?!\w))")


@dataclass(frozen=True, kw_only=True)
class Section:
    """What README says of the H100.

    Attributes:
        prose: Everything but tables, on one line, without asterisks.
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
        _, found, rest = page.partition(f"{HEADING}\n")
        if not found:
            raise ClaimError(f"README has no section {HEADING!r}")
        words: list[str] = []
        tables: list[list[list[str]]] = []
        within = False
        for line in re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
            if line.lstrip().startswith("|"):
                tables += [] if within else [[]]
                tables[-1].append([cell.strip().strip("*") for cell in line.strip().strip("|").split("|")])
            else:
                words += line.split()
            within = line.lstrip().startswith("|")
        return cls(
            prose=" ".join(words).replace("*", ""),
            tables=tuple(
                tuple(dict(zip(head, line, strict=False)) for line in lines) for head, _, *lines in tables if lines
            ),
        )

    def quoted(self, quote: str) -> re.Match[str]:
        """Where these words stand; the first group is the number in the place of ``{}``.

        Raises:
            ClaimError: Nowhere, or in several places.
        """
        before, after = (re.escape(" ".join(part.split(" "))) for part in quote.split(HOLE))
        found = list(re.finditer(rf"{before}(?<![\d.])({_NUMBER})(?![\d]|\.\d){after}", self.prose))
        if len(found) != 1:
            places = "no longer says" if not found else f"says {len(found)} times"
            raise ClaimError(f"README {places} {quote!r}; quote it as it is now")
        return found[0]

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

    def uncovered(self, quotes: Iterable[str], lines: Iterable[tuple[str, ...]]) -> list[str]:
        """Every "N times", "N%" and line of leads that is in none of these quotes and lines, with the words before it.

        Raises:
            ClaimError: A quote stands nowhere.
        """
        covered = {self.quoted(quote).start(1) for quote in quotes}
        missing = [
            self.prose[max(0, match.start() - 60) : match.end() + len(" times as")].strip()
            for match in _RATIO.finditer(self.prose)
            if match.start() not in covered
        ]
        known = set(lines)
        for table in self._with_leads():
            heading = next(iter(table[0]))
            missing += [f"{heading}: {line[heading]}" for line in table if (heading, line[heading]) not in known]
        return missing


def read_readme(path: Path = README) -> Section:
    """README's section.

    Raises:
        ClaimError: It cannot be read, or has none.
    """
    try:
        return Section.of(read_file(path).decode())
    except OSError as error:
        raise ClaimError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClaimError(f"{path}: not UTF-8") from None
