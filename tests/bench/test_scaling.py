"""`bench scaling`: its cases, what is measured again, efficiency with its interval, and the command."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.jobs import CaseJob, RankJob
from bench.cases.scaling import Axes, alone_of, powers_up_to, scaling_cases, to_measure
from bench.cli import main as cli
from bench.cli import scaling as command
from bench.judge.scaling import points
from bench.run.gpus import Card
from bench.run.process import WorkerError
from bench.run.runner import Sweep
from bench.store.ledgers import Scaling
from bench.store.rows import Row, read_results


def axes(**changes: Any) -> Axes:
    fields: dict[str, Any] = {
        "models": ("DiG:triton:variant=release", "Flash-DiT:sdpa-cudnn"), "size": "XL", "patch": 2, "resolution": 256,
        "batch": 32, "processes": (1, 2, 4), "parallel": ("ddp", "fsdp"), "sending": ("collectives",),
        "executions": ("graph", "eager"), "dtype": "bf16", "device": "cuda",
    }  # fmt: skip
    return Axes(**{**fields, **changes})


def test_cases_are_compiled_where_the_suite_best_compiles_them() -> None:
    found = [(case.family, case.way, case.parallel, case.processes) for case in scaling_cases(axes(processes=(1, 2)))]
    assert found == [
        ("DiG", "graph", "", 1),
        ("DiG", "graph", "ddp", 2),
        ("DiG", "graph", "fsdp", 2),
        ("DiG", "eager", "", 1),
        ("DiG", "eager", "ddp", 2),
        ("DiG", "eager", "fsdp", 2),
        ("Flash-DiT", "compiled-graph by block", "", 1),
        ("Flash-DiT", "compiled-graph by block", "ddp", 2),
        ("Flash-DiT", "compiled-graph by block", "fsdp", 2),
        ("Flash-DiT", "compile by block", "", 1),
        ("Flash-DiT", "compile by block", "ddp", 2),
        ("Flash-DiT", "compile by block", "fsdp", 2),
    ]
    cases = scaling_cases(axes(models=("DiG",), processes=(4,), executions=("eager",), device="cpu", dtype="fp32"))
    assert [(case.way, case.processes) for case in cases] == [("eager", 1), ("eager", 4), ("eager", 4)]


def test_gpus_may_send_in_several_ways() -> None:
    found = scaling_cases(
        axes(models=("DiG",), processes=(2,), executions=("graph",), sending=("copies", "collectives"))
    )
    assert [case.together for case in found] == ["", "ddp by copies", "ddp", "fsdp by copies", "fsdp"]
    assert {alone_of(case) for case in found} == {found[0]}
    with pytest.raises(ValueError, match="copies go between GPUs; device is cpu"):
        replace(found[1], device="cpu")
    with pytest.raises(ValueError, match="one process sends nothing; sending is copies"):
        replace(found[0], sending="copies")


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (8, [1, 2, 4, 8])])
def test_as_many_as_there_are(most: int, counts: list[int]) -> None:
    assert powers_up_to(most) == counts


def test_one_gpu_is_measured_again_beside_what_is_left() -> None:
    cases = scaling_cases(axes())
    last = next(case for case in cases if (case.family, case.parallel, case.processes) == ("DiG", "fsdp", 4))
    left = to_measure(cases, [case for case in cases if case != last])
    assert left == [alone_of(last), last]
    assert to_measure(cases, cases) == []
    assert to_measure(cases, []) == cases


def scaled(case: Case, ms: float, silent: float | None = None, run: str = "r", **changes: Any) -> Row:
    scaling = Scaling(run=run, silent_ms=(silent,) * 9 if silent else ())
    fields = {"status": "ok", "samples_ms": (ms,) * 9} if ms else {"status": "oom"}
    environment = {"gpu_name": "H100"}
    return Row(case=case, started_at="", scaling=scaling, environment=environment, **{**fields, **changes})  # type: ignore[arg-type]


def test_efficiency_is_against_one_gpu_of_the_same_run_and_way() -> None:
    graph = Case(model="DiG-XL/2", resolution=256, batch=32, execution="graph")
    several = replace(graph, processes=2, parallel="ddp")
    eager = replace(several, execution="eager")
    rows = [
        scaled(graph, 70.0),
        scaled(several, 80.0, 75.0),
        scaled(eager, 100.0),
        scaled(replace(several, processes=4), 0),
    ]
    one, two, other_way, failed = points(rows)
    assert (one.efficiency, one.exposed_ms) == (None, None)
    assert two.efficiency is not None
    assert two.efficiency.median == pytest.approx(70 / 80)
    assert two.exposed_ms is not None
    assert two.exposed_ms.median == pytest.approx(5.0)
    assert (other_way.alone, other_way.efficiency, other_way.exposed_ms) == (None, None, None)
    assert (failed.step_ms, failed.efficiency) == (None, None)
    later = [*rows, scaled(several, 90.0, run="another")]
    assert [point.alone is None for point in points(later) if point.row.case == several] == [True]
    assert points([Row(case=graph, status="oom", started_at="")]) == []


def test_intervals_are_as_wide_as_both_allow() -> None:
    graph = Case(model="DiG-XL/2", resolution=256, batch=32, execution="graph")
    one = scaled(graph, 0, status="ok", samples_ms=(60.0, 70.0, 80.0))
    two = scaled(
        replace(graph, processes=2, parallel="ddp"), 0, silent=70.0, status="ok", samples_ms=(90.0, 100.0, 110.0)
    )
    (_, point) = points([one, two])
    assert point.efficiency is not None
    assert (point.efficiency.low, point.efficiency.high) == pytest.approx((60 / 110, 80 / 90))
    assert point.exposed_ms is not None
    assert (point.exposed_ms.low, point.exposed_ms.median, point.exposed_ms.high) == pytest.approx((20, 30, 40))


CARDS = tuple(
    Card(index=i, uuid=f"GPU-{i}", environment={"gpu_name": "H100", "gpu_uuid": f"GPU-{i}"}) for i in range(2)
)


@pytest.mark.parametrize(
    ("gpu", "options", "message"),
    [
        (True, ["--gpus", "7"], "there is no GPU 7; this machine has GPUs 0 to 1"),
        (True, ["--processes", "4"], "--processes takes a GPU each, and there are 2 GPUs to use; got 4"),
        (True, ["--gpus", "1", "--processes", "2"], "there is 1 GPU to use; got 2"),
        (True, ["--processes", "0"], "--processes must be at least 1"),
        (True, ["--processes", "two"], "--processes takes whole numbers"),
        (True, ["--parallel", "pipeline"], "unknown --parallel 'pipeline'"),
        (True, ["--executions", "compile"], "unknown --executions 'compile'"),
        (False, ["--gpus", "0"], "no NVIDIA GPU was found"),
        (False, ["--device", "cuda"], "no NVIDIA GPU was found"),
        (False, ["--gpus", "0", "--device", "cpu"], "--device cpu measures on none"),
        (False, ["--processes", "65"], "at most 64 on a CPU"),
        (False, ["--executions", "graph"], "needs a GPU"),
        (False, ["--models", "Dig"], "did you mean DiG?"),
        (False, ["--models", ""], "nothing to measure"),
        (False, ["--resolution", "100"], "not a multiple of 16"),
        (False, ["--batch", "0"], "--batch must be at least 1; got 0"),
        (False, ["--batch", str(2**31)], "--batch must be at most"),
        (False, ["--resolution", "0"], "--resolution must be at least 1; got 0"),
        (False, ["--size", ""], "unknown --size '' of DiG"),
        (False, ["--dtype", ""], "unknown --dtype ''"),
        (False, ["--executions", ""], "--executions needs at least one of graph, eager"),
        (False, ["--patch", "3"], "--patch must be one of 2, 4, 8; got 3"),
    ],
)
def test_bad_input_is_one_line(
    gpu: bool, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "gpu_present", lambda: gpu)
    monkeypatch.setattr(command, "visible_cards", lambda: list(CARDS))
    monkeypatch.setattr(command, "_measure", lambda *a, **k: pytest.fail("measured although the input is bad"))
    result = CliRunner().invoke(cli.app, ["scaling", *options, "--out", str(tmp_path / "s.jsonl")])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_failure_is_a_row_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with its measuring replaced: what it stores, resumes and prints."""
    asked: list[Case] = []

    def alone(self: Any, job: CaseJob) -> Row:
        asked.append(job.case)
        return Row(case=job.case, status="ok", started_at="", samples_ms=(10.0,) * 6, key=job.key)

    def ranks(job: RankJob, **options: Any) -> Row:
        asked.append(job.case)
        if job.case.parallel == "fsdp":
            raise WorkerError("timeout", "no result from rank 1 after 9 s; all ranks were killed")
        scaling = Scaling(run=job.run, silent_ms=(11.0,) * 6)
        return Row(case=job.case, status="ok", started_at="", samples_ms=(12.5,) * 6, key=job.job.key, scaling=scaling)

    monkeypatch.setattr(command.Referee, "measure", alone)
    monkeypatch.setattr(command.Referee, "agreement", lambda self, case: {})
    monkeypatch.setattr(command, "run_ranks", ranks)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    path = tmp_path / "s.jsonl"
    words = ["scaling", "--models", "DiT", "--device", "cpu", "--out", str(path)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1, result.output
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert [(row.case.parallel, row.status) for row in read_results(path).rows] == [
        ("", "ok"), ("ddp", "ok"), ("fsdp", "timeout"),
    ]  # fmt: skip
    assert all(
        row.scaling and row.environment.get("commit") for row in read_results(path).rows[1:] if row.status != "ok"
    )
    assert "0.8 (0.8 to 0.8)" in result.stdout
    assert "1.5 (1.5 to 1.5)" in result.stdout
    assert "no result from rank 1 after 9 s" in result.stderr
    asked.clear()
    CliRunner().invoke(cli.app, [*words, "--resume"])
    assert [case.parallel for case in asked] == ["", "fsdp"]


def test_what_parity_refuses_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"status": "error", "message": "off"}
    monkeypatch.setattr(command.Referee, "agreement", lambda self, case: said)
    monkeypatch.setattr(command, "run_ranks", lambda *a, **k: pytest.fail("measured"))
    case = Case(model="DiT-S/8", resolution=64, dtype="fp32", device="cpu", processes=2, parallel="ddp")
    (row,) = command.run_scaling(Sweep(cases=(case,)), [case], (), on_start=lambda case, doing: None)
    assert (row.status, row.message, row.case) == ("error", "parity: off", case)
