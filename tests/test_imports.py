"""Who may import whom, however an import is written."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dig.environment import ROOT


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it, also by `importlib.import_module`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where they lead"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            names |= {str(given.value) for given in node.args[:1] if isinstance(given, ast.Constant)}
    return names


def within(names: set[str], *packages: str) -> set[str]:
    """Those of the names that are of one of the packages, or in one."""
    return {name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)}


ROOMS = ("cases", "store", "parity", "measure", "run", "judge", "inspect", "ops", "sampling", "cli")
"""Of bench, each free to import from those before it; what lies beside them (messages) is everybody's."""
HEAVY = ("torch", *(f"bench.{room}" for room in ("parity", "measure", "run", "ops", "cli")))
"""What draws from stored rows has no need of."""
NUMBERS = "bench.measure.intervals"
"""All that it takes of `bench.measure`."""
AGAINST = {"bench/__init__.py imports bench.measure", "bench/measure/__init__.py imports bench.run.once"}
"""``bench.measure(model)``, for whoever measures from Python: a room that is a function too, and calls the runner's."""


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("dig", ("baselines", "bench", "reports")),
        ("baselines", ("bench", "reports")),
        ("bench", ("reports",)),
        ("reports", HEAVY),
    ],
)
def test_imports_go_upwards_only(folder: str, above: tuple[str, ...]) -> None:
    found = {path.name: within(imported(path), *above) for path in (ROOT / folder).rglob("*.py")}
    assert {name for name, names in found.items() if names - within(names, NUMBERS)} == set()


def test_reports_are_drawn_without_torch() -> None:
    """Whatever is imported on the way."""
    names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in (ROOT / "reports").rglob("*.py")]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize(
    "line",
    ["import a.b.c", "from a.b import c", "from a.b.c import d", "def f():\n    importlib.import_module('a.b.c').d"],
)
def test_no_way_of_importing_is_overlooked(line: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert within(imported(path), "a.b.c") == within(imported(path), "a") != set()
    assert not within(imported(path), "a.b.cd", "b", "a.b.c.e")


def test_rooms_of_bench_import_from_those_before_them_only() -> None:
    here = {path.name for path in (ROOT / "bench").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert here == set(ROOMS)
    against = []
    for index, room in enumerate(ROOMS):
        above = {f"bench.{name}" for name in ROOMS[index + 1 :]}
        for path in (ROOT / "bench" / room).rglob("*.py"):
            against += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(within(imported(path), *above))]
    rooms = [f"bench.{name}" for name in ROOMS]
    for path in (ROOT / "bench").glob("*.py"):
        if path.name != "__main__.py":
            against += [f"bench/{path.name} imports {name}" for name in sorted(within(imported(path), *rooms))]
    assert set(against) == AGAINST
