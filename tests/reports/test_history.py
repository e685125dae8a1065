"""A case over commits: which rows are a moment, where a level changes, and what is drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.store.rows import Row
from reports.history import app, changed, changes, draw, levels, moments, rows_of

runner = CliRunner()
TRITON = (("backend", "triton"),)
CASE = "DiG-S/2:triton@1024:train"
MakeRow = Callable[..., Row]


def at(make_row: MakeRow, index: int, ms: float, **changes: Any) -> Row:
    """A row of a commit of its own, an hour after the one before."""
    environment = {"gpu_name": "NVIDIA H100 80GB HBM3", "gpu_uuid": "GPU-1", "commit": f"{index:07x}abcdef"}
    environment |= changes.pop("environment", {})
    samples = tuple(ms * (1 + k / 10_000) for k in range(-4, 5))
    return make_row(
        "DiG-S/2", options=TRITON, samples_ms=samples, environment=environment,
        started_at=f"2026-11-{1 + index // 24:02}T{index % 24:02}:00:00+00:00", **changes,
    )  # fmt: skip


def series(count: int, step: float, where: int, seed: int = 0, noise: float = 0.003) -> list[float]:
    """Equal times with noise, and from one commit on more."""
    draw = np.random.default_rng(seed).normal(0, noise, count)
    return [10.0 * float(np.exp(x)) * (1 + step * (i >= where)) for i, x in enumerate(draw)]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_change_is_found_where_it_is(seed: int) -> None:
    (found,) = changes(series(20, 0.04, 13, seed), 0.001)
    assert found.index == 13
    assert found.factor == pytest.approx(1.04, abs=0.006)


def test_a_change_at_the_last_commit_is_found() -> None:
    assert [change.index for change in changes(series(12, 0.05, 11), 0.001)] == [11]


def test_equal_code_rarely_changes() -> None:
    alarms = sum(bool(changes(series(20, 0.0, 0, seed, 0.005), 0.001)) for seed in range(60))
    assert alarms <= 6  # 5% of them in the long run


def test_what_lies_below_the_noise_floor_is_no_change() -> None:
    quiet = [10.0] * 10 + [10.05] * 10
    assert [change.index for change in changes(quiet, 0.001)] == [10]
    assert changes(quiet, 0.02) == []


def test_a_drift_blames_no_commit(make_row: MakeRow) -> None:
    """40 commits of half a percent each, and one of 10%."""
    values = [10.0 * 1.005**i for i in range(40)]
    found = moments([at(make_row, i, ms) for i, ms in enumerate(values)], "time")
    (line,) = changed(found, changes(values, 0.005))
    assert line.startswith("drifts by +")
    assert "no commit there makes half of it" in line
    jump = [ms * (1.1 if i >= 20 else 1.0) for i, ms in enumerate(values)]
    found = moments([at(make_row, i, ms) for i, ms in enumerate(jump)], "time")
    lines = changed(found, changes(jump, 0.005))
    assert [line.partition(" by ")[0] for line in lines] == ["drifts", "changed", "drifts"]
    assert lines[1].endswith(f"at {20:07x}")


def test_few_commits_have_no_change_points() -> None:
    assert changes([1.0, 2.0, 3.0, 4.0], 0.001) == []


def test_levels_are_the_segments_means() -> None:
    values = [1.0, 1.0, 1.0, 4.0, 1.0, 4.0]
    found = changes([1.0, 1.0, 1.0, 4.0, 4.0, 4.0], 0.001)
    assert levels(values, found) == pytest.approx([1.0] * 3 + [16 ** (1 / 3)] * 3)


def test_moments_are_commits_in_the_order_of_time(make_row: MakeRow) -> None:
    rows = [
        at(make_row, 2, 12.0),
        at(make_row, 1, 10.0, launch=0),
        at(make_row, 1, 11.0, launch=1),
        at(make_row, 1, 15.0, launch=2),
        at(make_row, 3, 9.0, environment={"dirty": True, "gpu_uuid": "GPU-2"}, marks=("throttled",)),
    ]
    found = moments(rows, "time")
    assert [moment.commit for moment in found] == ["0000001", "0000002", "0000003+"]
    assert (found[0].value, found[0].low, found[0].high, found[0].launches) == (11.0, 10.0, 15.0, 3)
    assert found[1].low < 12.0 < found[1].high
    assert found[2].marks == ("throttled",)
    assert [moment.value for moment in moments(rows, "memory")] == [2.0, 2.0, 2.0]


def test_a_launch_that_was_measured_again_counts_once(make_row: MakeRow) -> None:
    first, again = at(make_row, 1, 10.0), at(make_row, 2, 9.0, environment={"commit": f"{1:07x}abcdef"})
    (moment,) = moments([first, again], "time")
    assert (moment.value, moment.launches) == (9.0, 1)


def test_a_case_is_found_by_the_options_that_are_named(make_row: MakeRow) -> None:
    release = (*TRITON, ("variant", "release"))
    rows = [make_row("DiG-S/2", options=release), make_row("DiG-S/2", options=release, mode="forward")]
    assert rows_of(CASE, rows) == rows[:1]
    cpu = make_row("DiG-S/2", options=(("backend", "reference"),), device="cpu", execution="eager", dtype="fp32")
    assert rows_of("DiG-S/2:reference@1024:train", [cpu]) == [cpu]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("DiG-S/2:triton@512:train", "no row of DiG-S/2:triton@512:train has a time; of DiG-S/2 there are"),
        ("DiG-S/2@1024:train", "name the options"),
        ("DiG-S/2@*:train", "a case is MODEL"),
        ("DiG-S/2", "a case is MODEL"),
        ("DoG-S/2@1024", "DoG"),
    ],
)
def test_a_case_without_rows_is_refused_in_one_line(
    make_row: MakeRow, write_rows: Callable[..., Path], tmp_path: Path, case: str, why: str
) -> None:
    rows = [make_row("DiG-S/2", options=TRITON), make_row("DiG-S/2", options=(("backend", "fla"),))]
    result = runner.invoke(app, [str(write_rows(rows)), "--case", case, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert why in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_options_are_checked(write_rows: Callable[..., Path], make_row: MakeRow) -> None:
    path = str(write_rows([make_row("DiG-S/2", options=TRITON)]))
    for words in (["--figure", "speed"], ["--noise", "0"], ["--noise", "nan"]):
        assert runner.invoke(app, [path, "--case", CASE, *words]).exit_code == 2


def test_a_commits_label_does_not_reach_the_caption(make_row: MakeRow) -> None:
    rows = [at(make_row, i, 10.0, environment={"commit": "87741eb1d4", "dirty": True}) for i in range(3)]
    found = moments(rows, "time")
    figure = draw(rows[0].case, "NVIDIA H100", found, [], "time").figure
    (label,) = [text.get_window_extent() for text in figure.axes[0].get_xticklabels() if text.get_text()]
    assert found[0].commit == "87741eb+"
    caption = min((text.get_window_extent() for text in figure.texts), key=lambda box: box.y0)
    assert label.y0 > caption.y1


def test_figure_and_data_are_written(make_row: MakeRow, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [at(make_row, index, ms) for index, ms in enumerate(series(12, 0.05, 8))]
    path, out = write_rows(rows), tmp_path / "out"
    result = runner.invoke(app, [str(path), "--case", CASE, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "at 0000008" in result.output
    assert {file.name for file in out.iterdir()} == {"history.png", "history.svg", "history.csv"}
    lines = list(csv.DictReader((out / "history.csv").open()))
    assert [line["commit"] for line in lines] == [f"{index:07x}" for index in range(12)]
    (changed,) = [line for line in lines if line["change_percent"]]
    assert changed["commit"] == "0000008"
    assert float(changed["change_percent"]) == pytest.approx(5, abs=0.6)
    svg = (out / "history.svg").read_text()
    assert 'id="change:8"' in svg
    assert 'id="levels"' in svg


def test_rows_of_another_machine_are_said_to_be_left_out(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [at(make_row, i, 10.0) for i in range(3)]
    rows += [at(make_row, 5, 7.0, environment={"gpu_name": "NVIDIA H200"})]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    found = runner.invoke(app, [str(path), "--case", CASE, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "on NVIDIA H100 80GB HBM3: 3 commits" in found.output
    assert "left out: 1 rows on NVIDIA H200" in found.output
