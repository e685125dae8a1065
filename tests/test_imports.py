"""Who may import whom, however an import is written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dig.environment import ROOT


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it, and of the packages that they are in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where they lead"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}


ROOMS = ("cases", "store", "parity", "measure", "run", "judge", "inspect", "ops", "sampling", "cli")
"""Of bench, each free to import from those before it; what lies beside them (messages) is everybody's."""
HEAVY = {"torch", *(f"bench.{room}" for room in ("parity", "measure", "run", "ops", "cli"))} - {"bench.measure"}
"""What draws from stored rows has no need of; of `bench.measure` it takes intervals, which are numbers alone."""


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("dig", {"baselines", "bench", "reports"}),
        ("baselines", {"bench", "reports"}),
        ("bench", {"reports"}),
        ("reports", HEAVY),
    ],
)
def test_imports_go_upwards_only(folder: str, above: set[str]) -> None:
    assert {path.name for path in (ROOT / folder).rglob("*.py") if imported(path) & above} == set()


def test_rooms_of_bench_import_from_those_before_them_only() -> None:
    here = {path.name for path in (ROOT / "bench").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert here == set(ROOMS)
    against = []
    for index, room in enumerate(ROOMS):
        above = {f"bench.{name}" for name in ROOMS[index + 1 :]}
        for path in (ROOT / "bench" / room).rglob("*.py"):
            against += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(imported(path) & above)]
    rooms = {f"bench.{name}" for name in ROOMS}
    for path in (ROOT / "bench").glob("*.py"):
        if path.name != "__main__.py":
            against += [f"{path.name} imports {name}" for name in sorted(imported(path) & rooms)]
    assert against == []
