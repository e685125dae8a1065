"""Signals to a run's whole process group, as SLURM, systemd and ``timeout`` send them: saved, and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dig.training.saving import checkpoint_files, step_of
from tests.dig.test_training import lines, newest, train
from tests.dig.test_training_identity import class_folders

pytestmark = pytest.mark.usefixtures("tiny_dig")
OPTIONS = ["--model", "DiG-S/8", "--batch", "4", "--image-size", "16", "--log-every", "1", "--save-every", "100000"]
OPTIONS += ["--ema", "0.9", "--grid-every", "0", "--device", "cpu", "--steps", "100000"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures") / "data")


class Run:
    """A real run in a process group of its own."""

    def __init__(self, data: Path, out: Path, *options: str, setup: str = "") -> None:
        self.out = out
        words = ["train", "--data", str(data), "--out", str(out), *OPTIONS, *options]
        script = (
            f"import sys\nfrom tests.dig.tiny import TINY, app, using\n{setup}\n"
            "with using(TINY):\n    app(sys.argv[1:], prog_name='d')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def steps(self) -> int:
        log = self.out / "train.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def members(self) -> list[psutil.Process]:
        """The processes of the group, the first one among them."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> str:
        _, errors = self.process.communicate(timeout=60)
        return errors

    def no_process_is_left(self, seconds: float = 10) -> bool:
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def begin(*options: str, setup: str = "") -> Run:
        started.append(Run(data, tmp_path / "run", *options, setup=setup))
        return started[-1]

    yield begin
    for run in started:
        for process in run.members():
            process.kill()


def last_event(run: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    return event


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT], [signal.SIGTERM] * 2])
def test_a_signal_to_the_group_saves(numbers: list[int], start: Callable[..., Run], data: Path) -> None:
    run = start("--workers", "2")
    run.wait_for(lambda: run.steps() >= 3)
    assert len(run.members()) == 3
    for number in numbers:
        run.send(number)
        time.sleep(0.02)
    errors = run.end()
    assert run.process.returncode == 130, errors
    assert "go on with the same command" in errors
    assert "Terminated" not in errors
    steps = step_of(checkpoint_files(run.out / "checkpoints")[0])
    assert steps == lines(run.out)[-1]["step"]
    assert last_event(run.out)["event"] == "stopped"
    assert run.no_process_is_left()
    # And goes on as if nothing had been.
    result = train(data, run.out, *OPTIONS, "--steps", str(steps + 2), "--workers", "0")
    assert result.exit_code == 0, result.output
    whole = run.out.with_name("whole")
    assert train(data, whole, *OPTIONS, "--steps", str(steps + 2), "--workers", "0").exit_code == 0
    assert lines(run.out) == lines(whole)
    ours, theirs = newest(run.out), newest(whole)
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_sigusr1_saves_and_goes_on(start: Callable[..., Run]) -> None:
    """What SLURM's --signal=USR1@60 sends before the limit, to every process of the job."""
    run = start("--workers", "2")
    run.wait_for(lambda: run.steps() >= 3)
    run.send(signal.SIGUSR1)
    run.wait_for(lambda: bool(checkpoint_files(run.out / "checkpoints")))
    run.wait_for(lambda: last_event(run.out)["event"] == "saved")
    saved = last_event(run.out)["step"]
    assert [step_of(path) for path in checkpoint_files(run.out / "checkpoints")] == [saved]
    run.wait_for(lambda: run.steps() >= saved + 2)
    assert len(run.members()) == 3
    run.send(signal.SIGTERM)
    errors = run.end()
    assert run.process.returncode == 130, errors
    assert run.no_process_is_left()


SLOW_SAVE = """
import time
from pathlib import Path
from dig.training import saving
write = saving.save_file
def slow(tensors, path, header):
    Path(sys.argv[5], "saving").touch()
    time.sleep(1)
    write(tensors, path, header)
saving.save_file = slow
"""
SLOW_GRID = """
import time
from pathlib import Path
from dig.diffusion.samplers import Denoiser
run = Denoiser.__call__
def slow(self, *inputs):
    Path(sys.argv[5], "drawing").touch()
    time.sleep(0.2)
    return run(self, *inputs)
Denoiser.__call__ = slow
"""


def test_a_signal_in_the_middle_of_a_save(start: Callable[..., Run]) -> None:
    run = start("--workers", "1", "--save-every", "3", setup=SLOW_SAVE)
    run.wait_for((run.out / "saving").exists)
    run.send(signal.SIGTERM)
    errors = run.end()
    assert run.process.returncode == 130, errors
    assert checkpoint_files(run.out / "checkpoints")
    assert not [path for path in (run.out / "checkpoints").iterdir() if path.name.startswith(".")]
    assert run.no_process_is_left()


def test_a_signal_in_the_middle_of_a_grid(start: Callable[..., Run], data: Path) -> None:
    """The run doesn't finish the grid first, which may take longer than it is given; the next process draws it."""
    options = ["--workers", "0", "--grid-every", "3", "--grid-steps", "200"]
    run = start(*options, setup=SLOW_GRID)
    run.wait_for((run.out / "drawing").exists)
    run.send(signal.SIGTERM)
    sent = time.monotonic()
    errors = run.end()
    assert run.process.returncode == 130, errors
    assert time.monotonic() - sent < 20  # all of the grid would take 40
    assert step_of(checkpoint_files(run.out / "checkpoints")[0]) == 3
    assert not list((run.out / "samples").iterdir())
    result = train(data, run.out, *OPTIONS, "--steps", "3", "--grid-every", "3", "--grid-steps", "2")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (run.out / "samples").iterdir()] == ["step-00000003.png"]


SLOW_DATA = """
import time
from dig.training.data import ImageFolder
fetch = ImageFolder.fetch
def slow(self, indices, mirrored):
    # The checksum of a run reads files, not batches: only steps wait here.
    time.sleep(0 if len(Reads) < 3 else 3600)
    Reads.append(1)
    return fetch(self, indices, mirrored)
Reads = []
ImageFolder.fetch = slow
"""


def test_a_signal_while_the_disk_hangs(start: Callable[..., Run]) -> None:
    run = start("--workers", "1", setup=SLOW_DATA)
    run.wait_for(lambda: run.steps() >= 3)
    run.send(signal.SIGTERM)
    run.wait_for(lambda: bool(checkpoint_files(run.out / "checkpoints")), seconds=5)
    errors = run.end()
    assert run.process.returncode == 130, errors
    assert run.no_process_is_left()


@pytest.mark.parametrize("moment", ["workers are being started", "batches wait to be handed on"])
def test_a_kill_leaves_no_process(moment: str, start: Callable[..., Run]) -> None:
    run = start("--workers", "8")
    run.wait_for(lambda: len(run.members()) >= 4 if moment.startswith("workers") else run.steps() >= 3)
    run.process.send_signal(signal.SIGKILL)
    # Before the command's next try would find the folder locked by them.
    assert run.no_process_is_left(seconds=3)
    run.end()


def test_a_worker_that_is_killed_costs_no_step(start: Callable[..., Run]) -> None:
    run = start("--workers", "2")
    run.wait_for(lambda: run.steps() >= 3)
    next(process for process in run.members() if process.pid != run.process.pid).kill()
    errors = run.end()
    assert run.process.returncode == 2, errors
    assert errors.count("error:") == 1
    assert "a process that reads data was killed" in errors.replace("\n", " ")
    assert "is saved: go on with the same command" in errors.replace("\n", " ")
    assert step_of(checkpoint_files(run.out / "checkpoints")[0]) == lines(run.out)[-1]["step"]
    assert last_event(run.out)["event"] == "failed"
    assert run.no_process_is_left()


def test_more_workers_than_any_machine_wants(data: Path, tmp_path: Path) -> None:
    for count in ("1000", "-1"):
        result = train(data, tmp_path / "run", *OPTIONS, "--workers", count)
        assert result.exit_code == 2
        assert f"workers must be 0 to 128; got {count}" in result.output
    assert not (tmp_path / "run").exists()
