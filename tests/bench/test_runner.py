"""The harness with real processes: results, memory that runs out, limits, kills, and going on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases.case import Case
from bench.cases.jobs import CaseJob, Limits, Phase
from bench.measure import case as worker
from bench.measure.timing import Sampled
from bench.run import runner
from bench.run.process import Worker, WorkerError
from bench.run.runner import Sweep, finished_launches, run_job, run_sweep
from bench.store.rows import ResultsWriter, Row, read_results
from tests.bench.harness import QUICK, TWO_MINUTES, alive, children, small


def measure(cases: list[Case], path: Path, *, limits: Limits = TWO_MINUTES, launches: int = 1) -> list[Row]:
    environment = {"commit": "abc"}
    sweep = Sweep(cases=tuple(cases), launches=launches, limits=limits, budget=QUICK, environment=environment)
    with ResultsWriter(path) as writer:
        return list(run_sweep(sweep, writer, on_start=lambda case, doing: None))


def test_a_case_becomes_a_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    (row,) = measure([small("DiG-S/8", mode="train")], path)
    assert read_results(path).rows == (row,)
    assert row.status == "ok"
    assert len(row.samples_ms) == 2
    assert row.parameters == 33_269_504
    assert row.implementations["recurrence"] == "reference"
    assert row.memory.parameters == 4 * (row.parameters)
    assert row.memory.process_peak > row.memory.parameters
    assert row.flops > 0
    assert row.matmul_ceiling > 1e9
    assert row.environment["commit"] == "abc"
    assert row.environment["torch"]
    assert set(row.seconds) == {"start", "compile", "warmup", "measure"}


def test_out_of_memory_is_a_row_and_the_next_case_runs(tmp_path: Path) -> None:
    # More than any machine has: the allocator refuses at once.
    rows = measure([small(batch=10**9), small()], tmp_path / "results.jsonl")
    assert [row.status for row in rows] == ["oom", "ok"]
    assert "memory" in rows[0].message


@pytest.mark.slow
def test_time_limit_kills_the_process_and_the_next_case_runs(tmp_path: Path) -> None:
    before = children(os.getpid())
    slow = small("DiS-S/2", resolution=1024, batch=4, mode="train")
    start = time.monotonic()
    (row,) = measure([slow], tmp_path / "a.jsonl", limits=Limits(prepare=3, measure=3))
    assert row.status == "timeout"
    assert "after 3 s" in row.message
    assert time.monotonic() - start < 60
    assert [pid for pid in children(os.getpid()) - before if alive(pid) and b"DiS" in _command(pid)] == []
    assert measure([small()], tmp_path / "b.jsonl")[0].status == "ok"


@pytest.mark.parametrize(
    ("phases", "limits", "message"),
    [
        ([], Limits(prepare=0.5, measure=60), "no result after 0.5 s; the process was killed"),
        (
            ["building", "compiling"],
            Limits(prepare=4, measure=60),
            "no result after 4 s of building and tuning kernels; the process was killed",
        ),
        (
            ["building", "compiling", "measuring", "checking"],
            Limits(prepare=60, measure=0.5),
            "no result after 0.5 s of checking what was measured; the process was killed",
        ),
    ],
)
def test_building_and_measuring_have_limits_of_their_own(
    phases: list[Phase], limits: Limits, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "def begin(connection, phases):\n    for phase in phases:\n        connection.send(('phase', phase))\n"
    (tmp_path / "stuck_worker.py").write_text(f"import time\n\n{said}    time.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    told: list[Phase] = []
    with Worker("stuck_worker:begin", phases) as worker, pytest.raises(WorkerError) as raised:
        runner._wait(worker, limits, told.append)
    assert (raised.value.status, str(raised.value)) == ("timeout", message)
    assert told == phases


def test_a_run_is_told_what_is_done_with_a_case(tmp_path: Path) -> None:
    told: list[tuple[Case, str]] = []
    sweep = Sweep(cases=(small(),), budget=QUICK)
    with ResultsWriter(tmp_path / "results.jsonl") as writer:
        list(run_sweep(sweep, writer, on_start=lambda case, doing: told.append((case, doing))))
    assert [doing for _, doing in told][-5:] == [runner.STARTING, *runner.PHASES.values()]
    assert {case for case, _ in told} == {small()}


def _command(process_id: int) -> bytes:
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_error_is_a_row_with_its_message(tmp_path: Path) -> None:
    # Attention by cuDNN has no kernel on a CPU; cases built past the checks of the command line get this far.
    (row,) = measure([small("Flash-DiT-S/8", options=(("backend", "sdpa-cudnn"),))], tmp_path / "results.jsonl")
    assert row.status == "error"
    assert "RuntimeError" in row.message


def test_a_missing_package_is_an_unsupported_row(tmp_path: Path) -> None:
    (row,) = measure([small("DiG-S/8", options=(("backend", "fla"),))], tmp_path / "results.jsonl")
    assert row.status == "unsupported"
    assert "flash-linear-attention" in row.message


@pytest.mark.slow
def test_a_worker_that_is_killed_says_by_what(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "bench", "run", "--models", "DiS", "--resolution", "128", "--modes", "train"]
    harness = subprocess.Popen([*command, "--out", str(path)], stderr=subprocess.PIPE, text=True)
    worker = _wait_for_worker(harness.pid)
    os.kill(worker, signal.SIGKILL)
    harness.communicate(timeout=120)
    (row,) = read_results(path).rows
    assert row.status == "error"
    assert "SIGKILL" in row.message


def _wait_for_worker(harness: int, timeout: float = 60) -> int:
    """The process of a case: it leads a process group of its own, which no other descendant does."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for pid in children(harness):
            try:
                if os.getpgid(pid) == pid and os.getsid(pid) == pid and _busy(pid):
                    return pid
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    raise TimeoutError("no worker process appeared")


def _busy(process_id: int, seconds: float = 1.5) -> bool:
    """Say whether it has computed long enough to be past the matmul ceiling's short process."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > seconds


SEVERAL = [sys.executable, "-m", "bench", "run", "--models", "DiT,DiS", "--patch", "8", "--resolution", "64,128"]
SEVERAL += ["--modes", "train"]
"""A command of four cases, seconds each."""


@pytest.mark.slow
def test_killed_harness_leaves_whole_rows_no_orphans_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    command = [*SEVERAL, "--out", str(path), "--resume"]
    harness = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 2):
        time.sleep(0.05)
    descendants = children(harness.pid)
    harness.kill()
    harness.wait()
    kept = read_results(path).rows
    assert len(kept) >= 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in descendants):
        time.sleep(0.1)
    assert [pid for pid in descendants if alive(pid)] == []

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = read_results(path).rows
    assert rows[: len(kept)] == kept
    assert f"{len(kept)} done before" in done.stderr
    assert len({row.case for row in rows}) == len(rows) == 4
    assert {row.status for row in rows} == {"ok"}


@pytest.mark.slow
def test_interrupt_ends_cleanly_with_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    harness = subprocess.Popen([*SEVERAL, "--out", str(path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or not path.read_bytes().count(b"\n")):
        time.sleep(0.05)
    descendants = children(harness.pid)
    harness.send_signal(signal.SIGINT)
    _, stderr = harness.communicate(timeout=60)
    assert harness.returncode == 130
    assert "go on with --resume" in stderr
    assert "Traceback" not in stderr
    assert len(read_results(path).rows) >= 1
    assert read_results(path).torn == b""
    time.sleep(1)
    assert [pid for pid in descendants if alive(pid)] == []


def test_a_kernel_that_is_not_the_cases_leaves_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(worker, "kernel_names", lambda run, device: timed.append(run) or {"aten::mm", "flash_fwd"})
    row = worker.measure_case(CaseJob(case=small(), budget=QUICK, environment={}, matmul_ceiling=None, key="k"))
    assert len(timed) == 1
    assert (row.status, row.samples_ms, row.median_ms, row.timing) == ("error", (), None, None)
    assert "is not what its name says: flash_fwd ran" in row.message
    assert finished_launches([row]) == frozenset()
    assert Row.from_json(row.to_json()) == row


def sampled(ms: float, warmup: str = "steady") -> Sampled:
    return Sampled(samples_ms=(ms,) * 3, host_ms=ms, stop_reason="time", warmup=warmup, warmup_steps=3)


@pytest.mark.parametrize("warmup", ["steady", "bound"])
def test_times_that_had_not_settled_are_marked(warmup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "sample", lambda run, **options: sampled(1.0, warmup))
    row = worker.measure_case(CaseJob(case=small(), budget=QUICK, environment={}, matmul_ceiling=None))
    assert row.status == "ok", row.message
    assert ("unsteady" in row.marks) == (warmup == "bound")


@pytest.mark.parametrize(("eager_ms", "graph_ms", "share"), [(4.0, 1.0, 0.75), (1.0, 2.0, 0.0), (4.0, None, None)])
def test_the_share_of_launches_is_what_a_graph_saves(
    eager_ms: float, graph_ms: float | None, share: float | None
) -> None:
    case = small(execution="eager")
    timing = worker.timing_of(case, sampled(eager_ms), eager=None, graph_ms=graph_ms, flushed=False)
    assert (timing.eager_ms, timing.graph_ms, timing.launch_share) == (eager_ms, graph_ms, share)
    if graph_ms is not None:
        graph = replace(case, execution="graph", device="cuda")
        timing = worker.timing_of(graph, sampled(graph_ms), eager=sampled(eager_ms), graph_ms=None, flushed=True)
        assert (timing.eager_ms, timing.graph_ms, timing.launch_share) == (eager_ms, graph_ms, share)


def test_a_job_that_cannot_start_is_an_error() -> None:
    with pytest.raises(WorkerError, match="the process ended with status 1"):
        run_job("not a job", limits=Limits())  # type: ignore[arg-type]
