"""Ctrl-C, which a terminal sends to every process of a run, is the harness's alone: no other prints a traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench.run import preload
from bench.run.process import Worker
from dig.environment import ROOT
from tests.bench.harness import children

EARLY = """
import signal

class Seen:
    def __reduce__(self):
        return handler, ()

def handler():
    return repr(signal.getsignal(signal.SIGINT)), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

def begin(connection, seen):
    connection.send(seen)
"""
SERVER = """
import signal
from multiprocessing import forkserver
from pathlib import Path

from bench.run import process

process._start_server()
lines = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text().splitlines()
blocked = int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)
print(bool(blocked >> (signal.SIGINT - 1) & 1), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_process_ignores_it_before_it_knows_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs is unpickled in it first, and that is when this looks."""
    (tmp_path / "early_worker.py").write_text(EARLY)
    monkeypatch.syspath_prepend(tmp_path)
    import early_worker

    with Worker("early_worker:begin", early_worker.Seen()) as worker:
        assert worker.answer(60) == ("<Handlers.SIG_IGN: 1>", False)


def test_the_server_is_started_with_it_blocked_and_the_harness_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_a_process_that_was_never_told_what_to_run_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    preload._hook(EOFError, EOFError("Ran out of input"), None)
    assert capsys.readouterr().err == ""
    preload._hook(ValueError, ValueError("worth reading"), None)
    assert "worth reading" in capsys.readouterr().err


@pytest.mark.slow
def test_at_any_moment_it_ends_a_run_without_a_traceback(tmp_path: Path) -> None:
    draw = random.Random(0)
    command = [sys.executable, "-m", "bench", "run", "--models", "DiT", "--patch", "8", "--resolutions", "64"]
    command += ["--modes", "forward", "--device", "cpu", "--launches", "1000"]
    for index in range(9):
        out = tmp_path / f"{index}.jsonl"
        harness = subprocess.Popen(
            [*command, "--out", str(out)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # While the server starts, and while it imports; while processes are forked, one after the other.
            deadline = time.monotonic() + 60
            while len(children(harness.pid)) < 2 or (index % 3 == 2 and not (out.exists() and out.stat().st_size)):
                assert time.monotonic() < deadline, "no server was started, or nothing measured"
                time.sleep(0.005)
            time.sleep(draw.uniform(0, (0.3, 2, 1.5)[index % 3]))
            os.killpg(harness.pid, signal.SIGINT)
            _, stderr = harness.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):  # As it should be.
                os.killpg(harness.pid, signal.SIGKILL)
        assert "Traceback" not in stderr, stderr
        assert "KeyboardInterrupt" not in stderr, stderr
        assert "go on with --resume" in stderr
        assert harness.returncode == 130
