"""README's tables of what was published: every cell is of its row, marks too. The tables of leads are claims."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reports.best import memory, time
from reports.cells import GIB, number
from reports.claims.prose import README
from reports.claims.readme import HEADING, LEAD, read_readme
from reports.claims.rows import ROWS, Files
from reports.claims.subject import Subject

COLUMNS = (
    "DiG:triton:variant=release", "DiG:fla:variant=release", "DiT:materialized", "Flash-DiT:sdpa-cudnn",
    "Flash-DiT:flash-attn", "DiS:mamba-ssm",
)  # fmt: skip
MODES = {"training step": "train", "forward pass": "forward"}
MARKS = {"throttled": "ᵗ", "unsteady": "ᵘ"}
SOURCE = Files([ROWS / "rows.jsonl"], ["rows.jsonl"]).source("rows.jsonl")


def cells(page: str) -> Iterator[tuple[str, str]]:
    """A case and what its cell says, table by table."""
    size = mode = ""
    for line in page.partition(f"{HEADING}\n")[2].partition("\n## ")[0].splitlines():
        first, *rest = (cell.strip() for cell in line.strip().strip("|").split("|"))
        model, _, what = first.partition("/2, ")
        if len(rest) != len(COLUMNS):
            size = ""
        elif what in MODES:
            size, mode = model, MODES[what]
        elif size and first.isdecimal():
            for column, cell in zip(COLUMNS, rest, strict=True):
                family, _, options = column.partition(":")
                yield f"{family}-{size}/2:{options}@{first}:{mode}", cell.replace("**", "")


def of_row(name: str) -> tuple[str, str]:
    """What the rows say of a case: milliseconds with marks, and GiB; or why there is no time."""
    assert SOURCE is not None
    row = SOURCE.find(Subject.parse(name))
    assert row is not None, name
    if row.status == "oom":
        return "out of memory", ""
    marks = "".join(letter for mark, letter in MARKS.items() if mark in row.marks)
    return f"{number(time(row) or 0)}{marks}", str((memory(row) or 0) / GIB)


PUBLISHED = list(cells(README.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("name", "cell"), PUBLISHED)
def test_a_cell_is_of_its_row(name: str, cell: str) -> None:
    said, _, gib = cell.partition(" · ")
    ms, bytes_in_gib = of_row(name)
    assert said == ms
    assert not gib or gib == f"{float(bytes_in_gib):.{len(gib.partition('.')[2])}f}"


def test_all_cells_are_read() -> None:
    tables = [lines for lines in read_readme().tables if LEAD not in lines[0]]
    assert len(PUBLISHED) == len(COLUMNS) * sum(map(len, tables)) > 0, "a table or a line whose cells no test looks up"
    assert sum(" · " in cell for _, cell in PUBLISHED) == 5 * len(COLUMNS) - 1
