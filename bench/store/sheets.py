"""CSV that a spreadsheet may open: no text of a row is a formula there. No torch here."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

_FORMULA = tuple("=+-@＝＋－＠\t\n")
"""What the text of a formula may begin with, after OWASP's page on CSV injection; wide forms count in some places."""
_NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|inf|nan)", re.ASCII)


def harmless(value: Any) -> Any:
    """A cell's value; a text that a spreadsheet would take for a formula has a single quote before it.

    Numbers stay as they are, as numbers and as texts. Carriage returns become line feeds.
    """
    if not isinstance(value, str):
        return value
    if "\r" in value:
        # The csv module leaves it unquoted: a spreadsheet would begin a line there, and a cell.
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{value}" if value.startswith(_FORMULA) and _NUMBER.fullmatch(value) is None else value


def to_csv(names: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
    """A table as CSV, every cell `harmless`; None is an empty one.

    Args:
        names: Of the columns.
        lines: As many values each.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(harmless, names))
    writer.writerows(map(harmless, line) for line in lines)
    return text.getvalue()
