"""A case over commits: where a new level begins; and the fastest of the last commits as the gate's base."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bench.cli.regression
from bench.cli.main import app as bench_app
from bench.judge.history import best_of
from bench.judge.statistics import ratio_interval
from bench.store.rows import Row
from reports.claims.said import Pattern
from reports.history import app, change_points, draw, moments
from tests.reports.conftest import GPU, build_row

CASE = "DiG-S/2:triton@1024:train"
WOBBLE = (0.0, 0.002, -0.001, 0.001, -0.002, 0.002, 0.0, -0.001)


def commit(number: int) -> str:
    return f"{number:x}" * 40


def row_of(number: int, ms: float, **changes: Any) -> Row:
    """A row of a numbered commit, an hour after the one before."""
    environment = {**GPU, "commit": commit(number)[:7], "dirty": False, **changes.pop("environment", {})}
    given = {
        "options": (("backend", "triton"),),
        "samples_ms": tuple(ms * (1 + 0.003 * (i - 2)) for i in range(5)),
        "environment": environment,
        "started_at": f"2026-11-10T{number:02d}:00:00+00:00",
    }
    given |= changes
    if given.get("status", "ok") != "ok":
        del given["samples_ms"]
    return build_row("DiG-S/2", **given)


def series(levels: Iterable[float]) -> list[Row]:
    return [row_of(i, level * (1 + WOBBLE[i % len(WOBBLE)])) for i, level in enumerate(levels)]


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    return path


def test_a_planted_change_is_found_where_it_is_and_no_other() -> None:
    listed = moments(series([10.0] * 5 + [9.0] * 4 + [9.6] * 3), Pattern.parse(CASE))
    assert change_points([one.ms for one in listed]) == [5, 9]
    assert change_points([one.ms for one in moments(series([10.0] * 12), Pattern.parse(CASE))]) == []
    assert change_points([10.0, 5.0]) == []


def test_moments_are_in_the_order_of_time_and_of_the_case_alone() -> None:
    rows = [*series([3.0, 2.0]), row_of(2, 1.0, resolution=512), row_of(3, 1.5, status="error")]
    listed = moments(reversed(rows), Pattern.parse(CASE))
    assert [(one.commit, round(one.ms, 1)) for one in listed] == [("0000000", 3.0), ("1111111", 2.0)]


def test_the_figure_marks_new_levels() -> None:
    figure = draw(CASE, moments(series([10.0] * 5 + [8.0] * 5), Pattern.parse(CASE))).figure
    drawn = {line.get_gid() for line in figure.axes[0].get_lines()}
    assert {f"line:{CASE}", "change:5"} <= drawn
    caption = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "New levels: 5555555: 9.98 to 8.02 ms." in caption


def test_the_command_writes_a_figure_and_its_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", series([10.0] * 4 + [8.0] * 4))
    done = CliRunner().invoke(app, [str(file), "--case", CASE, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = list(csv.DictReader((tmp_path / "out" / "history-1.csv").open()))
    assert [one["level"] for one in written] == list("00001111")
    for case, message in (("DiG-XL/2@256", "no row of DiG-XL/2@256 has a time"), ("DiG-S/2", "a case is MODEL")):
        done = CliRunner().invoke(app, [str(file), "--case", case, "--out", str(tmp_path / "out")])
        assert (done.exit_code, message in done.output) == (2, True), done.output


def test_drift_in_small_steps_is_seen_against_the_best_of_the_last() -> None:
    """Six commits, each 1% slower: no step is above the gate's 2%; the last is 5% above the first."""
    rows = [row_of(i, 10 * 1.01**i) for i in range(6)]
    found = best_of([commit(i) for i in reversed(range(5))], rows, [rows[0].case])
    assert found is not None
    assert (found.commit, found.known, found.asked) == (commit(0), 5, 5)
    launches = [[ms * (1 + wobble) for wobble in WOBBLE] for ms in (row.median_ms for row in rows) if ms]
    assert ratio_interval(launches[4], launches[5], paired=True).high < 1.02
    assert ratio_interval(launches[0], launches[5], paired=True).low > 1.02


def test_only_commits_with_rows_of_every_case_count() -> None:
    """Nor those with changes beside them, nor what failed."""
    rows = [
        row_of(0, 5.0),
        row_of(1, 9.0),
        row_of(1, 9.0, resolution=512),
        row_of(2, 8.0, environment={"dirty": True}),
        row_of(2, 8.0, resolution=512),
        row_of(0, 5.0, resolution=512, status="error"),
    ]
    case = rows[0].case
    cases = [case, replace(case, resolution=512)]
    found = best_of([commit(i) for i in (2, 1, 0)], rows, cases)
    assert found is not None
    assert (found.commit, found.known) == (commit(1), 1)
    assert best_of([commit(0)], rows, cases) is None


def test_the_gate_takes_that_commit_as_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"options": (("backend", "reference"),), "execution": "eager", "device": "cpu", "dtype": "fp32"}
    rows = [row_of(i, ms, resolution=64, **options) for i, ms in enumerate((3.0, 2.0, 4.0))]
    file = write(tmp_path / "rows.jsonl", rows)
    taken: list[str] = []

    def run(self: object, base: str) -> tuple[int, str]:
        taken.append(base)
        return 0, "done\n"

    monkeypatch.setattr(bench.cli.regression._Gate, "run", run)
    monkeypatch.setattr(bench.cli.regression, "last_commits", lambda *_: [commit(i) for i in (2, 1, 0)])
    words = ["regression", "--case", "DiG-S/2:reference@64:train", "--device", "cpu", "--out", str(tmp_path / "out")]
    best = ["--best-of", "3", "--history", str(file)]
    done = CliRunner().invoke(bench_app, [*words, *best])
    assert done.exit_code == 0, done.output
    assert taken == [commit(1)]
    assert "base: 111111111111, the fastest of 3 commits" in done.output
    file.write_text("")
    for more, message in (
        (best, "none of the last 3 commits of main has rows of every case"),
        (["--best-of", "3"], "--best-of and --history go together"),
        ([*best, "--self-test"], "leave out one of them"),
    ):
        done = CliRunner().invoke(bench_app, [*words, *more])
        assert (done.exit_code, message in " ".join(done.output.split())) == (2, True), done.output
