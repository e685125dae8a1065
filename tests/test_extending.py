"""docs/extending.md does what it says: its example is run as it stands in the page, and its files are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.store.rows import read_results
from dig.environment import ROOT
from dig.family import Family
from dig.ops.tiles import Architecture
from dig.ops.tiles.choices import GlaTiles, WeightTiles
from dig.ops.tiles.products import ProductChoices

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of the page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.S)
    assert found is not None
    return found.group(1)


@pytest.mark.slow
def test_the_example_is_measured_beside_dig_and_drawn(tmp_path: Path) -> None:
    code = block("python")
    assert len(code.splitlines()) < 30
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "conv.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line in block("console").splitlines():
        command = [sys.executable, *shlex.split(line.removeprefix("$ python "))]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = read_results(tmp_path / "out" / "mine.jsonl").rows
    assert [(row.status, row.message) for row in rows] == [("ok", "")] * 8
    assert {row.case.model for row in rows} == {"DiG-S/2", "ConvNet-S/2"}
    assert all(row.flops for row in rows)
    marks = {row.marks for row in rows if row.case.family == "ConvNet"}
    assert marks == {("unverified", "no-reference", "small-parity")}
    drawn = {path.name for path in (tmp_path / "out" / "mine").iterdir()}
    assert {"speed_memory.png", "tables.md"} <= drawn
    tables = (tmp_path / "out" / "mine" / "tables.md").read_text()
    assert "| ConvNet" in tables
    assert "DiG (reference)" in tables


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:bench|dig|baselines|reports|tests|docs)/[\w/.]+\.\w+)`", PAGE)))
)
def test_files_of_the_page_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def first_cells(heading: str) -> list[str]:
    """Names in the first column of the first table after a heading."""
    table = re.search(r"^\|.*?\n(?!\|)", PAGE.partition(heading)[2], re.M | re.S)
    assert table is not None
    rows = [row.split("|")[1] for row in table.group().splitlines()[2:]]
    return [name for cell in rows for name in re.findall(r"`([\w.]+)`", cell)]


def test_tables_and_names_of_the_page_are_there() -> None:
    assert set(first_cells("### What a family may say")) <= set(Family.__dataclass_fields__)
    solvers = (ROOT / "dig/diffusion/solvers.py").read_text()
    assert all(
        word in solvers for word in ("class Solver(Protocol)", "SamplerName", "DEFAULT_STEPS", "def build_solver")
    )


def test_the_table_of_tile_choices_names_every_field() -> None:
    """Each field once; of those with parts that are found in different ways, each part."""
    parts = {
        "products": set(ProductChoices.__dataclass_fields__),
        "weights": set(WeightTiles.__dataclass_fields__),
        "gla": {"few", "few_programs"},
    }
    assert parts["gla"] < set(GlaTiles.__dataclass_fields__)
    expected = set(Architecture.__dataclass_fields__) - {"products", "weights"}
    expected |= {f"{field}.{name}" for field, names in parts.items() for name in names}
    assert sorted(first_cells("## A GPU added")) == sorted(expected)


def test_lines_of_the_page_end_where_others_do() -> None:
    """Tables and code apart."""
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.S).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.startswith("|")]
