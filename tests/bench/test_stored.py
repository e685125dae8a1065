"""The regression gate against the best of what was stored: small steps that add up are seen, noise is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.jobs import Budget
from bench.cli import gate
from bench.cli import main as cli
from bench.judge import regression as judged
from bench.judge.compare import Finding, Thresholds, compare_rows
from bench.judge.stored import against_best, last_results
from bench.run.checkouts import Checkout
from bench.store.ledgers import Memory
from bench.store.rows import Row

CASE = Case(model="DiT-S/8", resolution=64, execution="eager", dtype="fp32", device="cpu", mode="forward",
            options=(("backend", "materialized"),))  # fmt: skip
runner = CliRunner()


def result(
    day: int, times: Sequence[float], *, peak: int = 10**9, case: Case = CASE, cpu: str = "a processor", **about: str
) -> list[Row]:
    """The launches of one commit."""
    return [
        Row(
            case=case, status="ok", started_at=f"2026-11-{day:02}T0{i}:00:00+00:00", samples_ms=(ms,), launch=i,
            memory=Memory(parameters=1, process_peak=peak), key=f"key-{day}",
            environment={"cpu": cpu, "commit": f"{day:040x}", **about},
        )
        for i, ms in enumerate(times)
    ]  # fmt: skip


def launches(level: float, draw: np.random.Generator, noise: float = 0.002) -> list[float]:
    return [level * float(np.exp(x)) for x in draw.normal(0, noise, 6)]


def time_of(findings: Sequence[Finding]) -> Finding:
    return next(finding for finding in findings if finding.metric == "time")


@pytest.mark.parametrize("seed", range(3))
def test_five_steps_of_one_percent_are_the_same_one_by_one_and_slower_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    days = [result(day, launches(10.0 * 1.01**day, draw)) for day in range(1, 7)]
    for before, after in pairwise(days):
        assert time_of(compare_rows(before, after, Thresholds())).verdict == "same"
    stored = [row for day in days[:-1] for row in day]
    found = time_of(against_best(days[-1], stored, 5, Thresholds()))
    assert found.verdict == "slower"
    assert found.interval is not None
    assert found.interval.ratio == pytest.approx(1.01**5, rel=0.004)
    assert found.note == "best of the last 5, 000000000000 of 2026-11-01"
    # Further back than it looks there is nothing to compare with.
    assert time_of(against_best(days[-1], stored, 1, Thresholds())).verdict == "same"


def test_equal_results_raise_no_alarm() -> None:
    verdicts = []
    for seed in range(100):
        draw = np.random.default_rng(seed)
        days = [result(day, launches(10.0, draw, 0.01)) for day in range(1, 10)]
        stored = [row for day in days[:-1] for row in day]
        verdicts.append(time_of(against_best(days[-1], stored, 8, Thresholds(time=0.001))).verdict)
    assert verdicts.count("slower") <= 5


def test_memory_that_creeps_is_seen_by_its_own_best() -> None:
    days = [result(day, [10.0 - day] * 5, peak=int(10**9 * 1.05**day)) for day in range(1, 6)]
    stored = [row for day in days[:-1] for row in day]
    found = {finding.metric: finding for finding in against_best(days[-1], stored, 4, Thresholds())}
    assert found["memory"].verdict == "slower"
    assert "of 2026-11-01" in found["memory"].note
    assert found["time"].verdict == "faster"
    assert "of 2026-11-04" in found["time"].note


def test_results_are_of_the_case_and_machine_and_the_newest_first() -> None:
    own = result(9, [10.0])[0]
    stored = [
        *result(2, [10.0, 11.0]), *result(1, [10.0]), *result(3, [9.0], cpu="another"),
        *result(4, [9.0], case=Case(model="DiT-S/8", resolution=64)),
        Row(case=CASE, status="error", started_at="2026-11-05", environment=own.environment, message="broke"),
    ]  # fmt: skip
    found = last_results(stored, own, 5)
    assert [(each.ended_at[:10], len(each.rows), each.figure("time")) for each in found] == [
        ("2026-11-02", 2, 10.5),
        ("2026-11-01", 1, 10.0),
    ]
    assert against_best([own], [], 5, Thresholds()) == []
    (time, _) = against_best(
        result(9, [10.0] * 5, torch="2.13.0"), result(1, [10.0] * 5, torch="2.11.0"), 5, Thresholds()
    )
    assert time.note.endswith("torch was 2.11.0")


class Steady:
    """A side whose steps take 10 ms, on the processor of the stored rows."""

    parse = staticmethod(Row.from_json)

    def __init__(self, checkout: Checkout, *, time_limit: float) -> None:
        pass

    def measure(self, case: Case, *, budget: Budget, launch: int, tell: Callable[[str], None]) -> Row:
        (row,) = result(20, [10.0 * (1 + launch / 10_000)], case=case)
        return Row(**{**{name: getattr(row, name) for name in row.__dataclass_fields__}, "launch": launch})

    def __enter__(self) -> Steady:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.mark.parametrize(("stored", "status"), [(9.5, 1), (10.0, 0), (10.5, 0)])
def test_the_command_takes_the_best_of_stored_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: float, status: int
) -> None:
    def unpacked(root: Path, *rest: object) -> Checkout:
        return Checkout(root=root, name="0123")

    monkeypatch.setattr(gate, "copy_tree", unpacked)
    monkeypatch.setattr(gate, "check_out_base", unpacked)
    monkeypatch.setattr(judged, "Side", Steady)
    monkeypatch.setattr(gate.RegressionGate.__init__, "__defaults__", (Steady,))
    earlier = tmp_path / "earlier" / "20261101T000000" / "run"
    earlier.mkdir(parents=True)
    rows = [row for day in (1, 2) for row in result(day, [stored * (1 + i / 10_000) for i in range(6)])]
    (earlier / "change.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    words = ["regression", "--case", "DiT-S/8@64:forward", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert runner.invoke(cli.app, words).exit_code == 0
    found = runner.invoke(cli.app, [*words, "--best-of", "2", "--stored", str(tmp_path / "earlier")])
    assert found.exit_code == status, found.output
    assert "best of the last 2" in found.output
    # The runs that this command made itself are what it looks back at where nothing is named.
    assert "best of the last 1" in runner.invoke(cli.app, [*words, "--best-of", "3"]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best-of", "-1"], "--best-of must be at least 0"),
        (["--stored", "x"], "--stored is what --best-of N chooses from"),
        (["--best-of", "2", "--stored", "none.jsonl"], "cannot read none.jsonl"),
        (["--best-of", "2", "--stored", "."], "no runs in ."),
        (["--best-of", "2", "--self-test"], "--best-of is of a comparison with the base"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = runner.invoke(cli.app, ["regression", "--case", "DiT-S/8@64:forward", "--device", "cpu", *options])
    assert found.exit_code == 2
    assert message in found.output
