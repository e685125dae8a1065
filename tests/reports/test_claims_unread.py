"""Files that no claim reads: alone they are refused in one line, beside others they are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bench.store.rows import Row
from reports.claims import __main__ as command
from tests.reports.test_claims import CLAIM, pair

runner = CliRunner()
COUNT = """
[[count]]
id = "counted"
source = "the paper"
said = "as many"
what = "parameters"
models = ["DiT-S/8"]
values = ["33"]
within = 10
"""
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"kind": "sampling", "schema": 3, "case": {}}, "a row of sampling; python -m reports.sampling"),
    "capacity": ({"model": "DiG-S/2", "fits": True, "peak": 1}, "a probe of bench capacity; python -m reports.page"),
    "ablation": (
        {"experiment": "srem", "arm": "causal", "seed": 0},
        "a run of examples/ablation.py; python -m reports.ablation",
    ),
}


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text(CLAIM + COUNT)
    return path


@pytest.fixture
def rows(make_row: Callable[..., Row], write_rows: Callable[..., Path]) -> Path:
    return write_rows(pair(make_row, (20.0,) * 9, (10.0,) * 9))


def held(claims: Path, *words: object) -> Result:
    return runner.invoke(command.app, [*map(str, words), "--claims", str(claims)])


def of_kind(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.jsonl"
    path.write_text(json.dumps(KINDS[kind][0]) + "\n")
    return path


def refused(result: Result) -> str:
    """The one line."""
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [(), ("--id", "faster")])
def test_rows_of_another_kind_give_no_verdict(kind: str, ids: tuple[str, ...], claims: Path, tmp_path: Path) -> None:
    path = of_kind(tmp_path / "given", kind)
    for given in (path, path.parent):
        line = refused(held(claims, given, *ids, "--out", tmp_path / "out"))
        assert f" reads {path} (its first line is {KINDS[kind][1]} reads it). " in line
        assert ("name rows.jsonl" if ids else "name a file that python -m bench run wrote") in line
        assert ("--id" in line) == bool(ids)
    assert not (tmp_path / "out").exists()


def test_of_many_files_the_first_are_named(claims: Path, tmp_path: Path) -> None:
    given = [of_kind(tmp_path / name, "sampling") for name in "abcde"]
    line = refused(held(claims, *given))
    assert [str(path) in line for path in given] == [True, True, True, False, False]
    assert ", 2 others. " in line


def test_what_another_claim_reads_gives_one_that_reads_none_no_verdict(claims: Path, rows: Path) -> None:
    line = refused(held(claims, rows, "--id", "counted"))
    assert line.endswith(f"no claim that --id names reads {rows}. For counted, name none: models are counted anew")


def test_one_file_that_is_read_is_enough(claims: Path, rows: Path, tmp_path: Path) -> None:
    other = of_kind(tmp_path, "sampling")
    for given in ((rows, other), (other, rows), (tmp_path,)):
        for ids in ((), ("--id", "faster")):
            result = held(claims, *given, *ids)
            assert (result.exit_code, result.stderr) == (0, "no claim reads sampling.jsonl\n")
            assert "twice as fast" in result.stdout


def test_rows_of_steps_are_read_though_no_claim_is_of_their_case(
    claims: Path, make_row: Callable[..., Row], write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([make_row("DiS-S/2")], name="own.jsonl")
    result = held(claims, rows, "--id", "faster")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "1 not measured" in result.stdout


def test_without_files_claims_that_read_none_are_judged(claims: Path) -> None:
    result = held(claims, "--id", "counted")
    assert (result.exit_code, result.stderr) == (0, "")
    claims.write_text(COUNT)
    result = held(claims)
    assert result.exit_code == 0
    assert result.stderr.startswith("no claim reads ablation.jsonl, ")
