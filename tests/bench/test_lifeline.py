"""Nothing outlives a harness that is killed: no worker, no server, no child, and after the next start no folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dig.environment import ROOT
from tests.bench.harness import alive, children
from tests.bench.test_faults import WHEN_IMPORTED

CASE = ["--models", "DiT", "--patch", "8", "--resolutions", "64"]
RUN = ["-m", "bench", "run", *CASE, "--modes", "forward", "--device", "cpu"]
SAMPLING = ["-m", "bench", "sampling", *CASE, "--size", "S", "--steps", "1", "--batch", "1", "--device", "cpu"]
REGRESSION = ["-m", "bench", "regression", "--suite", "cpu", "--base", str(ROOT)]
ENDLESS = (
    "import subprocess; module.DiT.forward = lambda self, x, t, y: "
    "(open({pids!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)), [None for _ in iter(int, 1)])"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name: the server's socket is in its TMPDIR, and the path of a socket has 107 letters at most."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dig-test-") as name:
        yield Path(name)


def begin(folder: Path, command: list[str]) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
    """A harness in whose first forward pass a child is started, and which never comes back from it."""
    (folder / "tmp").mkdir(exist_ok=True)
    fault = ENDLESS.format(pids=str(folder / "pids"))
    (folder / "sitecustomize.py").write_text(WHEN_IMPORTED.format(module="baselines.dit", fault=fault))
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "TMPDIR": str(folder / "tmp")}
    harness = subprocess.Popen(
        [sys.executable, *command], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return harness, environment


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
@pytest.mark.parametrize("command", [RUN, SAMPLING, REGRESSION], ids=["run", "sampling", "regression"])
def test_a_killed_harness_leaves_no_process_and_the_next_start_no_folder(
    command: list[str], number: signal.Signals, folder: Path
) -> None:
    pids = folder / "pids"
    harness, environment = begin(folder, [*command, "--out", str(folder / "out")])
    try:
        assert wait_until(lambda: pids.exists() and pids.read_text(), 60)
        descendants = children(harness.pid)
        assert int(pids.read_text()) in descendants
        assert len(descendants) >= 2
    finally:
        harness.send_signal(number)
        harness.wait()
    assert wait_until(lambda: not any(map(alive, descendants)), 3), [
        Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants if alive(pid)
    ]
    start = "from bench.run.lifeline import scratch_folder; scratch_folder()"
    subprocess.run([sys.executable, "-c", start], env=environment, cwd=ROOT, check=True)
    # torch keeps what it compiled from one run to the next.
    assert {path.name.partition("_")[0] for path in (folder / "tmp").iterdir()} <= {"torchinductor"}


@pytest.mark.slow
def test_a_harness_killed_while_its_server_imports_leaves_none(folder: Path) -> None:
    harness, _ = begin(folder, [*RUN, "--out", str(folder / "out")])
    try:
        assert wait_until(lambda: len(children(harness.pid)) >= 2, 30)
        descendants = children(harness.pid)
    finally:
        harness.kill()
        harness.wait()
    assert wait_until(lambda: not any(map(alive, descendants)), 2)


def test_the_folder_of_a_harness_that_runs_is_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    code = "from bench.run.lifeline import scratch_folder; print(scratch_folder(), flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    folder = Path(first.stdout.readline().strip())
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, input="\n", text=True, check=True)
    assert folder.is_dir()
    first.communicate("\n", timeout=30)
    assert list(tmp_path.iterdir()) == []


LEAVES = """
import multiprocessing
import os
import signal

def leave(connection):
    made = [multiprocessing.get_context("forkserver").Semaphore() for _ in range(3)]
    connection.send(f"made {len(made)}")
    os.kill(os.getpid(), signal.SIGKILL)
"""
LOOKS = """
import os
from bench.run.process import Worker

before = os.environ.get("PYTHONWARNINGS")
with Worker("leaves:leave") as worker:
    print(worker.answer(60))
    worker.end()
assert os.environ.get("PYTHONWARNINGS") == before
"""


@pytest.mark.parametrize("warnings", [None, "error::SyntaxWarning"])
def test_what_a_killed_worker_leaves_is_removed_without_a_word(warnings: str | None, tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("PYTHONWARNINGS", None)
    environment |= {} if warnings is None else {"PYTHONWARNINGS": warnings}
    done = subprocess.run([sys.executable, "-c", LOOKS], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "made 3\n"), done.stderr
    assert done.stderr == ""
