"""Faults, with real processes: nothing measured is lost, nothing false is recorded, and the next case runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cases.case import Case
from bench.cases.jobs import Limits
from bench.inspect.capacity import CapacityError, largest_batch, largest_resolution, largest_that_fits, probe_case
from bench.run.runner import Referee
from bench.store.ledgers import Memory
from bench.store.migrations import SCHEMA
from bench.store.rows import ResultsWriter, Row, read_results
from dig.environment import ROOT

RUN = ["run", "--models", "DiT", "--patch", "8", "--modes", "forward", "--resolution", "64"]
CASE = Case(model="DiT-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu")


def harness(folder: Path, before: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the harness with some code run first in each of its processes, as a faulty machine or model would have it."""
    (folder / "sitecustomize.py").write_text(before)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "bench", *RUN, *options, "--out", str(folder / "rows.jsonl")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


WHEN_IMPORTED = """
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            {fault}
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    jumps = "import time, itertools\n_real, _n = time.time, itertools.count()\n"
    jumps += "time.time = lambda: _real() + (-1) ** next(_n) * 10 ** 6\n"
    done = harness(tmp_path, jumps, "--time-limit", "100")
    (row,) = read_results(tmp_path / "rows.jsonl").rows
    assert row.status == "ok", (row.message, done.stderr)
    assert all(0 < ms < 60_000 for ms in row.samples_ms)
    assert all(0 <= seconds < 100 for seconds in row.seconds.values())


def test_no_module_of_the_harness_times_anything_by_the_time_of_day() -> None:
    wrong = re.compile(r"\btime\.time\b|from time import|\bdatetime\.now\b|utcnow")
    files = (ROOT / "bench").rglob("*.py")
    found = {path.relative_to(ROOT / "bench").as_posix(): wrong.findall(path.read_text()) for path in files}
    # A row's started_at and a folder's name are for people.
    allowed = {"store/rows.py", "cli/gate.py"}
    assert {name for name, words in found.items() if words} == allowed
    assert all(set(found[name]) == {"datetime.now"} for name in allowed)


@pytest.mark.slow
def test_a_model_that_makes_nan_is_an_error_row(tmp_path: Path) -> None:
    fault = "module.FinalLayer.forward = lambda self, x, c: x.new_full((*x.shape[:2], 512), float('nan'))"
    harness(tmp_path, WHEN_IMPORTED.format(module="dig.layers", fault=fault))
    (row,) = read_results(tmp_path / "rows.jsonl").rows
    assert row.status == "error"
    assert "not finite" in row.message
    assert row.samples_ms == ()


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_its_children_and_the_next_case_runs(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # A child that outlives its parent, in the worker's group; then never an answer.
    fault = (
        "import os, subprocess, time; forward = module.DiT.forward; "
        "module.DiT.forward = lambda self, x, t, y: forward(self, x, t, y) if x.shape[-1] == 8 else "
        f"(open({str(pids)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)), time.sleep(600))"
    )
    done = harness(
        tmp_path,
        WHEN_IMPORTED.format(module="baselines.dit", fault=fault),
        "--resolutions",
        "128,64",
        "--prepare-limit",  # It hangs in the first step, where kernels are built.
        "12",
    )
    rows = read_results(tmp_path / "rows.jsonl").rows
    assert [row.status for row in rows] == ["timeout", "ok"], done.stderr
    child = int(pids.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_disk_that_fills_up_keeps_the_rows_before_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultsWriter(path) as writer:
        writer.write(Row(case=CASE, status="error", started_at="", message="x"))
    before = path.read_bytes()
    limit = len(before) + 100  # room for part of a row
    # A limit on file size is the full disk that needs no root: the kernel takes what fits, then refuses.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from pathlib import Path; "
        "from bench.cases.case import Case; from bench.store.rows import *; "
        "case = Case(model='DiT-S/8', resolution=64); writer = ResultsWriter(Path(sys.argv[1]))\n"
        "try: writer.write(Row(case=case, status='error', started_at='', message='y' * 4000))\n"
        "except ResultError as error: print(error); writer.close()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "the rows before are whole. Make room, then go on with --resume" in done.stdout
    assert path.read_bytes() == before


def test_a_harness_killed_while_it_writes_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from bench.cases.case import Case; from bench.store.rows import *\n"
        "case = Case(model='DiT-S/8', resolution=64); writer = ResultsWriter(Path(sys.argv[1]))\n"
        "for i in range(10**9): writer.write(Row(case=case, status='error', started_at='', message='m' * 100_000))"
    )
    for _ in range(3):
        size = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (not path.exists() or path.stat().st_size < size + 10**6):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = read_results(path)
        assert len(found.rows) >= 9
        assert {row.message for row in found.rows} == {"m" * 100_000}
    with ResultsWriter(path):
        pass
    assert read_results(path).torn == b""


def test_two_harnesses_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultsWriter(path):
        done = harness(tmp_path, "")
    assert done.returncode == 2
    assert "is being written by another run" in done.stderr


def test_a_file_of_a_newer_schema_ends_a_resumed_run_before_it_measures(tmp_path: Path) -> None:
    line = Row(case=CASE, status="error", started_at="").to_json().replace(f'"schema":{SCHEMA}', '"schema":7')
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    done = harness(tmp_path, "", "--resume")
    assert done.returncode == 2
    assert "schema 7 is newer than the one this version reads" in done.stderr
    assert (tmp_path / "rows.jsonl").read_text() == line + "\n"


@pytest.mark.slow
def test_a_host_without_memory_is_a_probe_that_does_not_fit() -> None:
    big = Case(model="DiT-S/2", resolution=1024, mode="forward", dtype="fp32", device="cpu")
    assert not probe_case(big, limit=512 << 20, time_limit=60).fits
    small = probe_case(CASE, limit=1 << 30, time_limit=60)
    assert small.fits
    assert small.peak is not None


def test_a_probe_that_fails_otherwise_ends_the_search() -> None:
    case = Case(model="Flash-DiT-S/8", options=(("backend", "sdpa-cudnn"),), resolution=64, device="cpu")
    with pytest.raises(CapacityError, match="RuntimeError"):
        probe_case(case, limit=None, time_limit=60)


@pytest.mark.parametrize("most", [1, 2, 7, 100])
def test_bisection_finds_the_edge_wherever_it_is(most: int) -> None:
    for edge in range(most + 2):
        tried = []

        def peak_of(n: int, edge: int = edge, tried: list[int] = tried) -> int | None:
            tried.append(n)
            return 0 if n <= edge else None

        assert largest_that_fits(peak_of, most=most) == (min(edge, most), edge >= most)
        assert len(tried) == len(set(tried))
        assert all(1 <= n <= most for n in tried)


@given(
    most=st.integers(1, 1 << 16),
    room=st.integers(0, 80 << 30),
    resident=st.integers(0, 20 << 30),
    each=st.integers(1, 1 << 30),
    wrong=st.floats(0.5, 2.0),
    power=st.sampled_from([1, 2]),
)
def test_peaks_that_mislead_cost_no_more_than_halving(
    most: int, room: int, resident: int, each: int, wrong: float, power: int
) -> None:
    """Whatever is believed of the room and the peaks, the edge is found, in 2 log2(n) tries or a few more."""
    tried = []

    def peak_of(n: int) -> int | None:
        tried.append(n)
        peak = resident + int(each * n**1.5)
        return peak if peak <= room else None

    found, bounded = largest_that_fits(peak_of, most=most, room=int(wrong * room), power=power)
    edge = max((n for n in (found, found + 1) if resident + int(each * n**1.5) <= room), default=0)
    assert found == min(edge, most) or (bounded and found == most)
    assert len(tried) == len(set(tried)) <= 2 * max(found, 1).bit_length() + 6


def test_peaks_that_tell_the_truth_spare_tries() -> None:
    """Peaks of DiG-XL/2's training step on an H100 with 79 GiB: the optimizer's up to 8 images, then by the image."""
    tried = []

    def peak_of(n: int) -> int | None:
        tried.append(n)
        peak = int((10.2 + max(0.0, 0.215 * (n - 11))) * 2**30)
        return peak if peak <= 79 << 30 else None

    assert largest_that_fits(peak_of, most=1 << 16, room=int(79.3 * 2**30)) == (331, False)
    assert len(tried) <= 9


def test_peaks_that_leave_something_out_cost_few_tries_more() -> None:
    """As on an H200: the allocator has 133.6 of the 140 GiB that the card seemed to have when its peak is reached."""
    tried = []

    def peak_of(n: int) -> int | None:
        tried.append(n)
        peak = int((10.2 + max(0.0, 0.2157 * (n - 11))) * 2**30)
        return peak if peak <= 133.6 * 2**30 else None

    assert largest_that_fits(peak_of, most=1 << 16, room=int(139.5 * 2**30)) == (583, False)
    assert len(tried) <= 14


def test_capacity_in_batch_and_in_whole_patches() -> None:
    from bench.inspect.capacity import Probe

    def probe(case: Case) -> Probe:
        fits = case.batch * case.resolution**2 <= 10 * 512**2
        return Probe(case=case, fits=fits, peak=1 if fits else None)

    case = Case(model="DiG-S/2", resolution=512)
    assert largest_batch(case, probe).largest == 10
    found = largest_resolution(case, probe)
    assert found.largest == 1616
    assert found.largest % 16 == 0
    assert largest_batch(Case(model="DiG-S/2", resolution=4096), probe).largest is None


def test_memory_that_is_not_given_back_is_waited_for_and_then_said(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [1 << 30, 9 << 30, 9 << 30, 1 << 30]

    class Card:
        def used(self) -> int:
            return levels.pop(0) if len(levels) > 1 else levels[0]

    monkeypatch.setattr("bench.run.runner.Gpu.open", classmethod(lambda cls: Card()))
    referee = Referee(limits=Limits())
    assert referee.wait_for_memory(patience=20)
    levels[:] = [9 << 30]
    assert not referee.wait_for_memory(patience=0.3)


def test_the_ledger_has_the_parts_of_a_training_step() -> None:
    from bench.cases.jobs import ProbeJob
    from bench.run.runner import run_job

    case = Case(model="DiT-S/8", resolution=64, mode="train", dtype="fp32", device="cpu")
    answer = run_job(ProbeJob(case=case), limits=Limits())
    memory = Memory(**{name: value for name, value in answer.items() if name != "status"})
    assert memory.gradients is not None
    assert memory.optimizer is not None
    # The fixed position embedding has no gradient; Adam keeps two moments and a step count of each parameter.
    assert 0.99 * memory.parameters < memory.gradients <= memory.parameters
    assert memory.optimizer == pytest.approx(2 * memory.gradients, rel=0.01)
