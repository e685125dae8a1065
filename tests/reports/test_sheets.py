"""What is written as CSV: no text of a row is a formula to a spreadsheet that opens it, and numbers stay numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from bench.cli.main import app as bench
from bench.store.rows import Row
from bench.store.sheets import harmless, to_csv
from dig.environment import ROOT
from reports.ablation import data as ablation_csv
from reports.ablation import read_ablation
from reports.history import data as history_csv
from reports.history import moments
from reports.page.__main__ import app as page
from tests.reports.conftest import GPU, build_row
from tests.reports.page_rows import write_everything

FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\n=1+1", "＝1+1", '=HYPERLINK("http://x","y")', "-", "=")
NUMBERS = ("-1", "+1.5", "-.5e-3", "-inf", "-75.7")


def cells(text: str) -> list[str]:
    return [cell for line in csv.reader(io.StringIO(text, newline="")) for cell in line]


def assert_harmless(text: str, *texts: str) -> None:
    """No cell begins as a formula does, but numbers; and every one of the texts is there, behind a quote."""
    found = cells(text)
    for each in found:
        assert not each.startswith(("=", "+", "@", "-", "\t", "\r")) or float(each) == float(each), each
    for each in texts:
        assert f"'{each}" in found, each


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_a_text_behind_a_quote(text: str) -> None:
    assert harmless(text) == f"'{text}"
    assert_harmless(to_csv((text, "b"), [(text, 1)]), text)


@pytest.mark.parametrize("text", ["a\r=1+1", "a\r\n=1+1", "a\n=1+1", 'a","=1+1', "a,=1+1", "a;\t=1+1"])
def test_no_text_ends_its_cell(text: str) -> None:
    assert cells(to_csv(("a",), [(text,)])) == ["a", text.replace("\r\n", "\n").replace("\r", "\n")]
    assert harmless("\r=1+1") == "'\n=1+1"


@pytest.mark.parametrize("value", [*NUMBERS, -1, -1.5, 0, None, True, "DiG-S/2", "a=1", "'=1", "", "python -m bench"])
def test_all_else_stays(value: Any) -> None:
    assert harmless(value) is value
    (_, found) = cells(to_csv(("a",), [(value,)])) if value not in (None, "") else ("", "")
    assert found == ("" if value is None else str(value))


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "-1+1|x"])
def test_every_csv_of_the_page(text: str, tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows", text)
    result = CliRunner().invoke(page, [str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = {path.name: path.read_bytes().decode() for path in (tmp_path / "out").rglob("*.csv")}
    assert {"rows.csv", "fig1a.csv", "capacity.csv"} <= found.keys()
    for content in found.values():
        assert_harmless(content)
    assert_harmless(found["rows.csv"], text)


def test_the_export(tmp_path: Path) -> None:
    rows = [build_row(ms=ms, environment={**GPU, "commit": "@c", "odd": odd}, started_at="2026-11-22T10:00:00Z")
            for ms, odd in ((9.0, "=1+1"), (9.5, -3))]  # fmt: skip
    rows.append(build_row(status="error", message="-x+1"))
    (tmp_path / "a.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    result = CliRunner().invoke(bench, ["export", str(tmp_path / "a.jsonl"), "--format", "csv"])
    assert result.exit_code == 0, result.output
    assert_harmless((tmp_path / "a.csv").read_text(), "=1+1", "@c", "-x+1")
    frame = pd.read_csv(tmp_path / "a.csv")
    assert list(frame["median_ms"][:2]) == [9.0, 9.5]
    assert list(frame["environment.odd"][:2]) == ["'=1+1", "-3"]
    assert list(frame["newest"]) == [False, False, True]


def test_a_history(make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(ms=ms, environment={**GPU, "commit": f"={day}"}, key=str(day), started_at=f"2026-11-2{day}T10:00:00Z")
        for day, ms in enumerate((9.0, 9.1))
    ]
    assert_harmless(history_csv(moments(rows, "time"), [], "time"), "=0", "=1")


def test_an_ablation(tmp_path: Path) -> None:
    path = ROOT / "results" / "h100" / "ablation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["arm"] = "=arm" if line["arm"] == "crisscross" else line["arm"]
    (tmp_path / "ablation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_harmless(ablation_csv(read_ablation(tmp_path / "ablation.jsonl")), "=arm")


def test_csv_is_written_in_one_place() -> None:
    own = {"bench/store/sheets.py"}
    found = {
        str(path.relative_to(ROOT))
        for folder in ("baselines", "bench", "dig", "examples", "reports")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bcsv\.(writer|DictWriter)\b|\.to_csv\(", path.read_text())
    }
    assert found - own == {"bench/store/export.py"}, "bench.store.sheets keeps spreadsheets from reading formulas"
