"""How numbers stand in the tables' cells, and how a table is written as GitHub Markdown."""

from __future__ import annotations

import math

import pandas as pd

from bench.messages import cell
from bench.store.rows import Mark, Row
from reports.series import DOUBTS, Launches, doubts

GIB = 2**30
MISSING = "\N{EN DASH}"


def number(value: float) -> str:
    """Three significant digits, without an exponent: ``0.0123``, ``1.80``, ``32.1``, ``12300``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.2e}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def milliseconds(row: Row, shared: frozenset[Mark]) -> str:
    """A row's time with its marks' letters; of several launches their range, and how many have a time if not all."""
    letters = "".join(DOUBTS[mark][0] for mark in doubts(row) if mark not in shared)
    text = number(row.median_ms or 0) + (f"<sup>{letters}</sup>" if letters else "")
    if not isinstance(row, Launches):
        return text
    low, high = map(number, row.spread_ms)
    count = len(row.launch_ms)
    some = f"; {count} of {count + row.failed}" if row.failed else ""
    return f"{text} [{low}, {high}{some}]"


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table, the index as its first columns."""
    flat = table.reset_index()
    keys = len(flat.columns) - len(table.columns)
    lines = [
        "| " + " | ".join(cell(str(column)) for column in flat.columns) + " |",
        "|" + " --- |" * keys + " ---: |" * len(table.columns),
        *("| " + " | ".join(map(str, values)) + " |" for values in flat.to_numpy().tolist()),
    ]
    return "\n".join(lines)
