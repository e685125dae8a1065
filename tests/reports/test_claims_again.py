"""What is printed under a verdict gives it: from the committed rows, and from rows that a command measured anew."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from bench.cli.main import app as bench
from dig.environment import ROOT
from reports.ablation_runs import RUNS
from reports.claims import __main__ as claims
from reports.claims.commands import MEASURED, from_root
from reports.claims.rows import ROWS, published

STORED: list[dict[str, Any]] = json.loads((ROWS.parent / "claims.json").read_text())
READ = {rows: [each for each in STORED if f" {rows} --id" in each["again"]] for rows in (
    "results/h100/rows.jsonl", "results/h200/best.jsonl", "results/h200/batch32.jsonl",
    "results/h200/best.jsonl results/h200/batch32.jsonl results/h200/batch32-best.jsonl",
    "results/h200/best.jsonl results/h200/batch32-best.jsonl",
    "results/h100/ablation.jsonl results/h200/ablation.jsonl",
)}  # fmt: skip
"""Claims by the files that their verdicts are from."""


def judged(command: str) -> str:
    """What a command says of its one claim."""
    program, flag, module, *words = shlex.split(command)
    assert (program, flag, module) == ("python", "-m", "reports.claims")
    result = CliRunner().invoke(claims.app, words)
    assert (result.exit_code, result.stderr) == (0, ""), command
    assert result.stdout.startswith("1 claim: 1 ")
    return result.stdout


def test_every_claim_of_rows_has_its_files() -> None:
    assert {each["id"] for own in READ.values() for each in own} == {each["id"] for each in STORED if each["again"]}
    counted = [each for each in STORED if not each["again"]]
    assert all(each["command"].startswith("python -m bench list ") for each in counted)


@pytest.mark.parametrize("rows", READ)
def test_the_committed_rows_give_the_published_verdict(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    own = READ[rows]
    # One of each verdict there is.
    for each in {one["verdict"]: one for one in own}.values():
        said = judged(each["again"])
        assert f"  {each['verdict'].upper()}: " in said
        assert each["measured"] is None or f"measured: {each['measured']}" in said


@pytest.mark.parametrize("rows", [rows for rows, own in READ.items() if any(one["verdict"] == "holds" for one in own)])
def test_what_was_measured_anew_is_judged(rows: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the first step had measured what was committed, into the files that it writes."""
    monkeypatch.chdir(tmp_path)
    each = next(one for one in READ[rows] if one["verdict"] == "holds")
    target = tmp_path / (RUNS if "ablation" in rows else MEASURED)
    target.parent.mkdir(parents=True)
    target.write_bytes(b"".join((ROOT / name).read_bytes() for name in rows.split()))
    said = judged(each["judging"])
    assert f"  HOLDS: {each['said']}" in said
    assert f"measured: {each['measured']}" in said
    assert f"$ {each['command']} && {each['judging']}\n" in said


def test_the_steps_meet_in_the_files_that_the_first_writes() -> None:
    command = typer.main.get_command(bench).commands["run"]  # type: ignore[attr-defined]
    assert str(command.make_context("run", []).params["out"]) == MEASURED
    for each in STORED:
        if each["command"].startswith("python examples/ablation.py "):
            assert shlex.split(each["command"])[3] == str(Path(RUNS).parent)
            assert f" {RUNS} " in each["judging"]
        elif each["again"]:
            assert f" {MEASURED} " in each["judging"]


def test_files_are_called_as_in_the_projects_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {from_root(path) for path in published()} >= {
        "results/h100/rows.jsonl",
        "results/h200/ablation.jsonl",
        "results/h200/best.jsonl",
    }
    monkeypatch.chdir(ROOT / "results" / "h100")
    assert from_root(Path("rows.jsonl")) == "results/h100/rows.jsonl"
    assert from_root(tmp_path / "rows.jsonl") == str(tmp_path / "rows.jsonl")


def test_claims_of_ones_own_are_named_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.toml"
    text = (ROOT / "reports" / "claims.toml").read_text()
    own.write_text("[[ratio]]" + text.split("[[ratio]]")[2])
    shutil.copy(ROWS / "rows.jsonl", tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(claims.app, ["rows.jsonl", "--claims", "own.toml", "--out", "out"])
    assert result.exit_code == 0, result.output
    (record,) = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert "--claims own.toml" in record["again"]
    assert "HOLDS" in judged(record["again"])


def test_a_claim_that_does_not_exist_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(claims.app, ["--id", "fig1-speed-publshed"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith("did you mean fig1-speed-published?")
